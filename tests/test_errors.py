"""What an error says of names and numbers from a stranger's file."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import shiradelta
from shiradelta import errors
from shiradelta.errors import FormatError, MissingDependencyError, ShiraDeltaError, SourceError, TargetError

STRANGE = "\x1b[2J\n" + "[" * 100_000


@pytest.mark.parametrize(
    "error",
    [
        SourceError(f"begin {STRANGE} end"),
        TargetError(f"begin {STRANGE}", ending="the end"),
        MissingDependencyError(f"begin {STRANGE} end"),
        FormatError("bad_name", f"{STRANGE} end", file="begin"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_message_is_one_printable_line_with_its_beginning_and_end(error: ShiraDeltaError) -> None:
    line = str(error)
    assert line.isprintable()
    assert len(line) < 1100
    assert line.startswith("begin")
    assert " characters ...] [" in line
    assert " end" in line[-200:]


def test_a_message_that_is_not_long_is_as_it_was() -> None:
    assert str(SourceError("café: " + "a" * 900)) == "café: " + "a" * 900


def test_users_see_errors_of_public_names_only() -> None:
    """A class of its own in another file would show in tracebacks under a name that nobody can import."""
    known = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, ShiraDeltaError)}
    assert known <= {*shiradelta.__all__}
    assert all(f" {name} " in (errors.__doc__ or "") or f"\n{name}\n" in (errors.__doc__ or "") for name in known)
    root = Path(errors.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "converters").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path != Path(errors.__file__):
                bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
                assert not bases & known, f"{path}: {node.name}"
