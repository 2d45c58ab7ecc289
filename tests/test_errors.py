"""What an error says of names and numbers from a stranger's file."""

from __future__ import annotations

import pytest

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
