"""What is public changes only on purpose: CONTRIBUTING.md, "Deprecation"."""

from __future__ import annotations

import difflib
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.public import MODULES, ROOT, SNAPSHOTS


@pytest.mark.parametrize("path", SNAPSHOTS, ids=lambda path: path.stem)
def test_what_is_public_is_what_the_snapshot_has(path: Path):
    then, now = path.read_text(encoding="utf-8").splitlines(), list(SNAPSHOTS[path]())
    changed = list(difflib.unified_diff(then, now, "snapshot", "today", lineterm="", n=1))
    assert not changed, (
        "keep an old name for one release (CONTRIBUTING.md, Deprecation), then write the snapshot again:"
        " python -m tests.public\n" + "\n".join(changed)
    )


def test_boolean_options_are_taken_by_keyword_only():
    """`apply(model, delta, None, 1.0, False, True)` tells a reader nothing."""
    public = [getattr(import_module(module), name) for module in MODULES for name in import_module(module).__all__]
    functions = [value for value in public if inspect.isfunction(value)]
    methods = [
        method
        for value in public
        if inspect.isclass(value) and not issubclass(value, Exception)
        for name, method in inspect.getmembers(value, callable)
        if not name.startswith("_")
    ]
    positional = {
        f"{function.__qualname__}: {parameter.name}"
        for function in (*functions, *methods)
        for parameter in inspect.signature(function).parameters.values()
        if isinstance(parameter.default, bool) and parameter.kind is not parameter.KEYWORD_ONLY
    }
    assert positional == set()


def test_the_changelog_lists_every_old_name_that_is_still_taken():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n## 0.1.0")[0]
    for path in SNAPSHOTS:
        for old, new in re.findall(r"([\w-]+)(?:: hidden, use| means) ([\w-]+)", path.read_text(encoding="utf-8")):
            assert any(old in line and new in line for line in changes.splitlines()), f"{old} -> {new}"
