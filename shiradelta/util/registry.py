"""A table of all members of one kind, such as the value codecs, the masks or the merge methods.

Each kind has one `Registry`, with one row a member.  Command-line choices, tables in the documentation, parameters of
tests and error messages are derived from it, so a new member is one `add`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from shiradelta.errors import ArgumentError


class Named(Protocol):
    """A row: whatever has a name."""

    @property
    def name(self) -> str:
        """What a user calls the member; unique in its registry."""


Row = TypeVar("Row", bound=Named)


class Registry(Mapping[str, Row]):
    """Name -> row, in the order in which the rows were added.

    Args:
        kind: what a member is called in messages, such as "mask".
        rows: the members to begin with.
    """

    def __init__(self, kind: str, rows: Iterable[Row] = ()) -> None:
        self.kind = kind
        self._rows: dict[str, Row] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> Row:
        """Adds a member and returns it.

        Raises:
            ArgumentError: the name is taken.
        """
        if row.name in self._rows:
            raise ArgumentError(f"{self.kind} {row.name!r} is registered already; give another name")
        self._rows[row.name] = row
        return row

    def remove(self, name: str) -> None:
        """Takes a member out, as a test does with what it has added."""
        del self._rows[name]

    def find(self, name: object) -> Row:
        """The row of a name that a user gave.

        Raises:
            ArgumentError: there is none; the message lists those that there are.
        """
        row = self._rows.get(name) if isinstance(name, str) else None
        if row is None:
            raise ArgumentError(f"{self.kind} {name!r} is unknown; take {', '.join(self._rows)}")
        return row

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
