"""STRUCT: whole rows, columns and diagonals (FORMAT.md, 4.5)."""

from __future__ import annotations

import numpy as np

from shiradelta import wire
from shiradelta.arithmetic import Positions
from shiradelta.codecs.base import SLACK, Bytes, between, check_zero
from shiradelta.delta import matrix_shape
from shiradelta.errors import FormatError

ROW, COLUMN, DIAGONAL = 0, 1, 2
#: (kind, start, step, count)
Entry = tuple[int, int, int, int]


def line_range(kind: int, rows: int, columns: int) -> tuple[int, int]:
    """The first and the last line of a kind."""
    return ((0, rows - 1), (0, columns - 1), (1 - rows, columns - 1))[kind]


def elements(kind: int, line: int, rows: int, columns: int) -> int:
    """Elements on one line."""
    if kind == DIAGONAL:
        return min(rows, columns - line) - max(0, -line)
    return columns if kind == ROW else rows


def lines_of(entry: Entry) -> range:
    """The lines that an entry lists."""
    _, start, step, count = entry
    return range(start, start + step * count, step)


def positions_on(kind: int, line: int, rows: int, columns: int) -> Positions:
    """The positions on one line, increasing."""
    count = elements(kind, line, rows, columns)
    if kind == ROW:
        return np.arange(line * columns, (line + 1) * columns, dtype=np.int64)
    if kind == COLUMN:
        return np.arange(rows, dtype=np.int64) * columns + line
    first = line if line >= 0 else -line * columns
    return first + np.arange(count, dtype=np.int64) * (columns + 1)


def runs(kind: int, lines: Positions) -> list[Entry]:
    """Increasing lines cut greedily into arithmetic progressions."""
    entries: list[Entry] = []
    at = 0
    while at < lines.size:
        step, stop = 1, at + 1
        if stop < lines.size:
            step = int(lines[stop] - lines[at])
            while stop < lines.size and lines[stop] - lines[stop - 1] == step:
                stop += 1
        entries.append((kind, int(lines[at]), step, stop - at))
        at = stop
        if len(entries) > wire.MAX_STRUCT_ENTRIES:
            break
    return entries


def _whole(candidates: Positions, lines: Positions, kind: int, rows: int, columns: int) -> Positions:
    """Those of the sorted candidates of which every element occurs in `lines`."""
    if not candidates.size:
        return candidates
    slot = np.minimum(np.searchsorted(candidates, lines), candidates.size - 1)
    counts = np.bincount(slot[candidates[slot] == lines], minlength=candidates.size)
    lengths = [elements(kind, int(line), rows, columns) for line in candidates]
    whole: Positions = candidates[counts == np.array(lengths)]
    return whole


def find_entries(positions: Positions, shape: tuple[int, ...]) -> list[Entry] | None:
    """The entries whose union is `positions`, by the rule of FORMAT.md, section 8; None if none is."""
    rows, columns = matrix_shape(shape)
    if positions.size < min(rows, columns):
        # Shorter than every row and every column; a lone short diagonal is cheaper in RICE.
        return None
    row, column = np.divmod(positions, columns)
    whole_columns = _whole(column[row == 0], column, COLUMN, rows, columns)
    row_starts = row[column == 0]
    whole_rows = _whole(row_starts, row, ROW, rows, columns)
    rest = ~(np.isin(row, whole_rows) | np.isin(column, whole_columns))
    diagonals = np.zeros(0, np.int64)
    if rest.any():
        corner = np.union1d(column[row == 0], -row_starts)
        diagonals = _whole(corner, column - row, DIAGONAL, rows, columns)
        left = (column - row)[rest]
        diagonals = np.intersect1d(diagonals, left)
        if not np.all(np.isin(left, diagonals)):
            return None
    entries = runs(ROW, whole_rows) + runs(COLUMN, whole_columns) + runs(DIAGONAL, diagonals)
    return entries if len(entries) <= wire.MAX_STRUCT_ENTRIES else None


class Struct:
    """See the module."""

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """32 bytes an entry; None for positions that are no union of lines."""
        entries = find_entries(positions, shape)
        return None if entries is None else len(entries) * wire.STRUCT_ENTRY.size + wire.SLACK

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """One entry to the limit."""
        count, rest = divmod(size - wire.SLACK, wire.STRUCT_ENTRY.size)
        return rest == 0 and 1 <= count <= wire.MAX_STRUCT_ENTRIES

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """The entries, in order."""
        entries = find_entries(positions, shape)
        assert entries is not None, "size() said that it can"
        return b"".join(wire.STRUCT_ENTRY.pack(*entry) for entry in entries) + SLACK

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        """Checks entry by entry, so that no more than a few times nnz positions are ever made."""
        rows, columns = matrix_shape(shape)
        entries = list(wire.STRUCT_ENTRY.iter_unpack(data[: data.size - wire.SLACK].tobytes()))
        before, listed = (-1, 0), 0
        for kind, start, step, count in entries:
            if kind > DIAGONAL or step == 0 or count == 0:
                raise FormatError("bad_index", f"an entry of kind {kind}, step {step}, count {count}")
            first, final = line_range(kind, rows, columns)
            last = start + step * (count - 1)
            if start < first or last > final:
                raise FormatError("bad_index", f"lines {start} to {last} of {first} to {final}")
            if kind < before[0] or (kind == before[0] and start <= before[1]):
                raise FormatError("position_order", "entries of STRUCT")
            listed = (listed if kind == before[0] else 0) + self._listed((kind, start, step, count), rows, columns, nnz)
            if listed > nnz:
                raise FormatError("bad_index", f"more elements than the {nnz} nonzeros")
            before = kind, last
        found = [positions_on(entry[0], line, rows, columns) for entry in entries for line in lines_of(entry)]
        positions = np.unique(np.concatenate(found))
        if positions.size != nnz:
            raise FormatError("bad_index", f"{positions.size} elements for {nnz} nonzeros")
        check_zero(data, data.size - wire.SLACK)
        return positions

    @staticmethod
    def _listed(entry: Entry, rows: int, columns: int, limit: int) -> int:
        """Elements on an entry's lines; may stop counting beyond `limit`."""
        if entry[0] != DIAGONAL:
            return entry[3] * elements(entry[0], entry[1], rows, columns)
        if entry[3] > limit:  # every diagonal has an element
            return entry[3]
        return sum(elements(DIAGONAL, line, rows, columns) for line in lines_of(entry))

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """The section is small: decoded whole."""
        return between(self.decode(data, nnz, shape), start, stop)
