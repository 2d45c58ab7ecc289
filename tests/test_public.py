"""What is public changes only on purpose: CONTRIBUTING.md, "Deprecation"."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.public import SNAPSHOTS


@pytest.mark.parametrize("path", SNAPSHOTS, ids=lambda path: path.stem)
def test_what_is_public_is_what_the_snapshot_has(path: Path):
    then, now = path.read_text(encoding="utf-8").splitlines(), list(SNAPSHOTS[path]())
    changed = list(difflib.unified_diff(then, now, "snapshot", "today", lineterm="", n=1))
    assert not changed, (
        "keep an old name for one release (CONTRIBUTING.md, Deprecation), then write the snapshot again:"
        " python -m tests.public\n" + "\n".join(changed)
    )
