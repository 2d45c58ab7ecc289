"""A table of all members of one kind, such as the value codecs, the masks or the merge methods.

Each kind has one `Registry`, with one row per member.  Command-line choices, tables in the documentation, parameters of
tests and error messages are derived from it, so a new member is one `add`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol, TypeVar

from shiradelta.errors import ArgumentError


class Named(Protocol):
    """A row of a registry: any object with a name."""

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
        """Removes a member, for tests that have added one."""
        del self._rows[name]

    def find(self, name: object) -> Row:
        """Finds the row of a name that a user gave.

        Raises:
            ArgumentError: the name is unknown; the message lists the known ones.
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


class Numbered(Named, Protocol):
    """A row that also has a number in files."""

    @property
    def id(self) -> int:
        """The number in files, one byte; unique in its registry."""


NumberedRow = TypeVar("NumberedRow", bound=Numbered)


class IdRegistry(Registry[NumberedRow]):
    """A `Registry` whose members have ids, as those of the file format do.

    Attributes:
        by_id: id -> row; a view that follows `add` and `remove`.
    """

    def __init__(self, kind: str, rows: Iterable[NumberedRow] = ()) -> None:
        self._by_id: dict[int, NumberedRow] = {}
        self.by_id: Mapping[int, NumberedRow] = MappingProxyType(self._by_id)
        super().__init__(kind, rows)

    def add(self, row: NumberedRow) -> NumberedRow:
        taken = self._by_id.get(row.id)
        if taken is not None:
            raise ArgumentError(f"{self.kind} {row.name!r}: id {int(row.id)} is that of {taken.name!r}; give another")
        if not 0 <= row.id <= 255:
            raise ArgumentError(f"{self.kind} {row.name!r}: id {row.id} does not fit one byte; give another")
        super().add(row)
        self._by_id[int(row.id)] = row
        return row

    def remove(self, name: str) -> None:
        del self._by_id[int(self[name].id)]
        super().remove(name)
