"""STRUCT: whole rows, columns and diagonals (FORMAT.md, 4.5)."""

from __future__ import annotations

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, between, check_zero
from shiradelta.format.delta import matrix_shape
from shiradelta.format.registry import IndexId

ROW, COLUMN, DIAGONAL = 0, 1, 2
#: (kind, start, step, count)
Entry = tuple[int, int, int, int]


def line_range(kind: int, rows: int, columns: int) -> tuple[int, int]:
    """The first and the last line of a kind."""
    return ((0, rows - 1), (0, columns - 1), (1 - rows, columns - 1))[kind]


def elements(kind: int, lines: Positions, rows: int, columns: int) -> Positions | int:
    """Elements on each line of a kind."""
    if kind == DIAGONAL:
        return np.minimum(rows, columns - lines) - np.maximum(0, -lines)
    return columns if kind == ROW else rows


def lines_of(entry: Entry) -> Positions:
    """The lines that an entry lists; the step of a single one may be any number."""
    _, start, step, count = entry
    return start + (step if count > 1 else 0) * np.arange(count, dtype=np.int64)


def positions_on(entry: Entry, rows: int, columns: int) -> Positions:
    """The positions on an entry's lines, line after line."""
    kind, lines = entry[0], lines_of(entry)
    first, stride = ((lines * columns, 1), (lines, columns), (_corner(lines, columns), columns + 1))[kind]
    lengths = np.broadcast_to(elements(kind, lines, rows, columns), lines.shape)
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    positions: Positions = np.repeat(first, lengths) + steps * stride
    return positions


def _corner(diagonals: Positions, columns: int) -> Positions:
    """The first position of each diagonal: in the first row, or in the first column."""
    return np.where(diagonals >= 0, diagonals, -diagonals * columns)


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
        if len(entries) > registry.MAX_STRUCT_ENTRIES:
            break
    return entries


def _count_on(candidates: Positions, lines: Positions) -> Positions:
    """How many of `lines` are each of the sorted candidates."""
    slot = np.minimum(np.searchsorted(candidates, lines), candidates.size - 1)
    counts: Positions = np.bincount(slot[candidates[slot] == lines], minlength=candidates.size)
    return counts


def _whole_rows(positions: Positions, columns: int) -> Positions:
    """Rows of which every element is listed: runs of consecutive positions that start a row."""
    if positions.size < columns:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(positions[columns - 1 :] - positions[: positions.size - columns + 1] == columns - 1)
    first = positions[starts]
    rows: Positions = first[first % columns == 0] // columns
    return rows


def _columns_of(positions: Positions, row: int, columns: int) -> Positions:
    """The columns that are listed in one row."""
    first, last = np.searchsorted(positions, [row * columns, (row + 1) * columns])
    return positions[first:last] - row * columns


def _whole_columns(positions: Positions, rows: int, columns: int) -> Positions:
    """Columns of which every element is listed; three rows rule out most others."""
    found = _columns_of(positions, 0, columns)
    for row in (rows // 2, rows - 1):
        found = np.intersect1d(found, _columns_of(positions, row, columns), assume_unique=True)
    return found[_count_on(found, positions % columns) == rows] if found.size else found


def _whole_diagonals(positions: Positions, rest: Positions, rows: int, columns: int) -> Positions | None:
    """Wholly listed diagonals that hold all of `rest`; None if there are none."""
    # Scattered positions are recognised by a few elements: both ends of a whole diagonal are listed.
    sample = rest[:: max(1, rest.size // 64)]
    d = sample % columns - sample // columns
    length = elements(DIAGONAL, d, rows, columns)
    first = _corner(d, columns)
    for end in (first, first + (length - 1) * (columns + 1)):
        slot = np.minimum(np.searchsorted(positions, end), positions.size - 1)
        if np.any(positions[slot] != end):
            return None
    found = np.unique(rest % columns - rest // columns)
    counts = _count_on(found, positions % columns - positions // columns)
    return found if np.array_equal(counts, elements(DIAGONAL, found, rows, columns)) else None


def find_entries(positions: Positions, shape: tuple[int, ...]) -> list[Entry] | None:
    """The entries whose union is `positions`, by the rule of FORMAT.md, section 8; None if there are none."""
    rows, columns = matrix_shape(shape)
    if positions.size < min(rows, columns):
        return None
    whole_rows = _whole_rows(positions, columns)
    whole_columns = _whole_columns(positions, rows, columns)
    rest = positions
    if whole_rows.size or whole_columns.size:
        in_lines = np.isin(positions // columns, whole_rows) | np.isin(positions % columns, whole_columns)
        rest = positions[~in_lines]
    diagonals = _whole_diagonals(positions, rest, rows, columns) if rest.size else rest
    if diagonals is None:
        return None
    entries = runs(ROW, whole_rows) + runs(COLUMN, whole_columns) + runs(DIAGONAL, diagonals)
    return entries if len(entries) <= registry.MAX_STRUCT_ENTRIES else None


class Struct(IndexCodec):
    """The index codec STRUCT."""

    id = IndexId.STRUCT
    name = "STRUCT"
    least = registry.STRUCT_ENTRY.size + registry.SLACK

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        entries = find_entries(positions, shape)
        return None if entries is None else len(entries) * registry.STRUCT_ENTRY.size + registry.SLACK

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        count, rest = divmod(size - registry.SLACK, registry.STRUCT_ENTRY.size)
        return rest == 0 and 1 <= count <= registry.MAX_STRUCT_ENTRIES

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        entries = find_entries(positions, shape)
        assert entries is not None, "size() said that it can"
        return b"".join(registry.STRUCT_ENTRY.pack(*entry) for entry in entries) + SLACK

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        """Checks entry by entry, so that no more than a few times nnz positions are ever made."""
        rows, columns = matrix_shape(shape)
        entries = list(registry.STRUCT_ENTRY.iter_unpack(data[: data.size - registry.SLACK].tobytes()))
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
        found = [positions_on(entry, rows, columns) for entry in entries]
        positions = np.unique(np.concatenate(found))
        if positions.size != nnz:
            raise FormatError("bad_index", f"{positions.size} elements for {nnz} nonzeros")
        check_zero(data, data.size - registry.SLACK)
        return positions

    @staticmethod
    def _listed(entry: Entry, rows: int, columns: int, limit: int) -> int:
        """Elements on an entry's lines; may stop counting beyond `limit`."""
        kind, _, _, count = entry
        if kind != DIAGONAL:
            return count * (columns if kind == ROW else rows)
        if count > limit:  # every diagonal has an element
            return count
        return int(np.sum(elements(kind, lines_of(entry), rows, columns)))

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Decodes the whole section, which is small."""
        return between(self.decode(data, nnz, shape), start, stop)
