"""Reads examples: from JSON Lines, from a data set of Hugging Face, or from a list."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.text.dataset import dataset_rows, is_dataset
from shiradelta.text.jsonl import json_lines
from shiradelta.text.kinds import KINDS, MESSAGES, TEXT, ExampleKind

#: Fewer examples leave nothing to measure on.
LEAST = 10


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one kind.

    Attributes:
        kind: their kind.
        rows: the values of each example, one for each key of the kind.
    """

    kind: ExampleKind
    rows: list[list[Any]]

    @property
    def plain(self) -> list[Any]:
        """Each example as a user's own function gets it: a text, or a mapping of the kind's keys."""
        if self.kind.is_text:
            return [row[0] for row in self.rows]
        return [dict(zip(self.kind.keys, row, strict=True)) for row in self.rows]

    @property
    def identity(self) -> list[list[Any]]:
        """What tells the examples from others, in types that JSON can hold."""
        return [[self.kind.known(*pair) for pair in zip(row, self.kind.keys, strict=True)] for row in self.rows]


def of_texts(texts: Sequence[str]) -> ExampleSet:
    """Texts by themselves."""
    return ExampleSet(TEXT, [[text] for text in texts])


def read_file(
    path: str | os.PathLike[str],
    kinds: Iterable[ExampleKind] = KINDS.values(),
    skipped: Callable[[int], None] | None = None,
    least: int = LEAST,
) -> ExampleSet:
    """The examples of a JSON Lines file, or of a data set of Hugging Face.

    The first example decides the kind.  Empty lines are skipped.

    Args:
        path: the file or folder.  FILE:COLUMN takes one column or key: texts, or conversations if it has lists.
        kinds: the kinds to accept.
        skipped: called with the number of blank examples, which are skipped; without it they are refused.
        least: the least number of examples.

    Raises:
        SourceError: the file cannot be read, an example is not of the file's kind, or there are too few.
        MissingDependencyError: a data set is given, and the package datasets is not installed.
    """
    file, column = _split_column(path)
    kinds = list(kinds)
    shapes = f'{{"{column}": ...}}' if column else " or ".join(one.shape for one in kinds)
    records = dataset_rows(file) if is_dataset(file) else json_lines(file, shapes)
    folder = file if file.is_dir() else file.parent
    kind, rows, blank = _of_one_kind(records, kinds, column, shapes, skipped is not None, folder)
    if skipped is not None and blank:
        skipped(blank)
    check_number(len(rows), os.fspath(path), least)
    assert kind is not None
    return ExampleSet(kind, rows)


def read_list(examples: Sequence[Any]) -> ExampleSet | None:
    """Texts, or objects of one kind as a file has them; None if they are anything else.

    Raises:
        SourceError: an object is not of the kind of the first one.
    """
    if all(isinstance(one, str) for one in examples):
        return of_texts(examples)
    if not all(isinstance(one, Mapping) for one in examples):
        return None
    shapes = " or ".join(one.shape for one in KINDS.values())
    records = ((f"example {number}", dict(one)) for number, one in enumerate(examples, 1))
    kind, rows, _ = _of_one_kind(records, KINDS.values(), None, shapes, skip=False)
    assert kind is not None
    return ExampleSet(kind, rows)


def check_number(count: int, where: str, least: int = LEAST) -> None:
    """Raises SourceError if there are too few examples."""
    if count < least:
        found = "1 example is" if count == 1 else f"{count} examples are"
        raise SourceError(f"{where}: {found} too few; give {least}, better some thousands")


def _split_column(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """(path, column) of FILE:COLUMN; a colon belongs to the name if there is a file of that name."""
    file, _, column = os.fspath(path).rpartition(":")
    if file and column and not Path(path).exists() and Path(file).exists():
        return Path(file), column
    return Path(path), None


def _of_one_kind(
    records: Iterator[tuple[str, Any]],
    kinds: Iterable[ExampleKind],
    column: str | None,
    shapes: str,
    skip: bool,
    folder: Path | None = None,
) -> tuple[ExampleKind | None, list[list[Any]], int]:
    """(kind, rows, number of blank examples that were skipped)."""
    kind: ExampleKind | None = None
    rows: list[list[Any]] = []
    blank = 0
    for where, found in records:
        if not isinstance(found, dict):
            raise SourceError(f"{where}: is not an object; write {shapes}")
        if kind is None:
            kind = _kind_of(found, kinds, column)
        if kind is None:
            keys = ", ".join(map(str, list(found)[:3]))
            raise SourceError(f"{where}: is no example, its keys are {keys or 'none'}; write {shapes}")
        row = kind.row(found, where, folder)
        if skip and all(map(kind.is_blank, row)):
            blank += 1
            continue
        for key, value in zip(kind.keys, row, strict=True):
            if kind.is_blank(value):
                raise SourceError(f"{where}: the text of {key!r} is blank; leave the example out")
        rows.append(row)
    return kind, rows, blank


def _kind_of(found: Mapping[str, Any], kinds: Iterable[ExampleKind], column: str | None) -> ExampleKind | None:
    """The kind of an example, or of a column of it."""
    if column is None:
        # Those that have more than texts first: a sound has a text as well.
        ordered = sorted(kinds, key=lambda one: not one.media)
        return next((one for one in ordered if found.keys() >= set(one.keys)), None)
    if column not in found:
        return None
    wanted = MESSAGES if isinstance(found[column], list) else TEXT
    return replace(wanted, keys=(column,)) if wanted in kinds else None
