"""Reads JSON Lines: one JSON object per line, in UTF-8, with or without a byte order mark."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shiradelta.errors import SourceError
from shiradelta.io.recognise import Wanted, explain

#: Fewer examples leave nothing to measure on.
LEAST = 10


@dataclass(frozen=True)
class ExampleKind:
    """A kind of example: the keys of its JSON object, each with a text."""

    name: str
    keys: tuple[str, ...]

    @property
    def shape(self) -> str:
        """An example of the object, for messages."""
        return "{" + ", ".join(f'"{key}": "..."' for key in self.keys) + "}"


#: A text by itself, the only kind that a fit takes.
TEXT = ExampleKind("text", ("text",))


Kind = TypeVar("Kind", bound=ExampleKind)


def read_rows(
    path: str | os.PathLike[str], kinds: Iterable[Kind], skipped: Callable[[int], None] | None = None
) -> tuple[Kind, list[list[str]]]:
    """(kind, one list of texts per example) of a JSON Lines file.

    The first line decides the kind.  Empty lines are skipped.

    Args:
        path: the file.
        kinds: the kinds to accept.
        skipped: called with the number of examples whose texts are all blank, which are skipped; without it they are
            refused.

    Raises:
        SourceError: the file cannot be read, a line is not an example of the file's kind, or there are too few.
    """
    kinds = list(kinds)
    shapes = " or ".join(one.shape for one in kinds)
    kind: Kind | None = None
    rows: list[list[str]] = []
    blank = 0
    for where, found in _lines(Path(path), shapes):
        if not isinstance(found, dict):
            raise SourceError(f"{where}: is not an object; write {shapes}")
        if kind is None:
            kind = next((one for one in kinds if found.keys() >= set(one.keys)), None)
        if kind is None:
            keys = ", ".join(map(str, list(found)[:3]))
            raise SourceError(f"{where}: is no example, its keys are {keys or 'none'}; write {shapes}")
        row = _row(found, kind, where)
        if skipped is not None and not any(text.strip() for text in row):
            blank += 1
            continue
        _check_not_blank(row, kind, where)
        rows.append(row)
    if skipped is not None and blank:
        skipped(blank)
    check_number(len(rows), os.fspath(path))
    assert kind is not None
    return kind, rows


def check_number(count: int, where: str) -> None:
    """Raises SourceError if there are too few examples."""
    if count < LEAST:
        raise SourceError(f"{where}: {count} examples are too few; give {LEAST}, better some thousands")


def _lines(path: Path, shapes: str) -> Iterator[tuple[str, Any]]:
    """(where the line is, its value) of each line that is not empty."""
    if (message := explain(path, Wanted.TEXTS)) is not None:
        raise SourceError(message)
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where, shapes)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8; save it as UTF-8") from None


def _parsed(line: str, where: str, shapes: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the latter where it is nested deeper than any example
        raise SourceError(f"{where}: is not JSON; write one object a line, such as {shapes}") from None


def _row(found: dict[str, Any], kind: ExampleKind, where: str) -> list[str]:
    """The texts of an example."""
    row = []
    for key in kind.keys:
        if key not in found:
            raise SourceError(f"{where}: lacks the key {key!r}; every line of the file needs the form {kind.shape}")
        if not isinstance(found[key], str):
            raise SourceError(f"{where}: the value of {key!r} is not a text; write {kind.shape}")
        if any("\ud800" <= character <= "\udfff" for character in found[key]):  # no tokenizer takes half a character
            raise SourceError(f"{where}: the text of {key!r} has a lone surrogate, which is no character; take it out")
        row.append(found[key])
    return row


def _check_not_blank(row: list[str], kind: ExampleKind, where: str) -> None:
    """Raises SourceError if one of an example's texts is blank."""
    for key, text in zip(kind.keys, row, strict=True):
        if not text.strip():
            raise SourceError(f"{where}: the text of {key!r} is blank; leave the line out")
