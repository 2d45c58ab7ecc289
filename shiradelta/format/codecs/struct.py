"""STRUCT: whole rows, columns and diagonals (FORMAT.md, 4.5)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, check_zero
from shiradelta.format.delta import matrix_shape
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import WINDOW, distinct, ranges

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


def lines_of(entry: Entry, start: int = 0, stop: int | None = None) -> Positions:
    """The lines that an entry lists, or those from number start to stop - 1; the step of one may be any number."""
    _, line, step, count = entry
    return line + (step if count > 1 else 0) * np.arange(start, count if stop is None else stop, dtype=np.int64)


#: How many rows are looked at before all elements are: of a column, of which each has to be listed.
_SAMPLED = 32
#: A part of a matrix: from row and column, to row and column.
Block = tuple[int, int, int, int]


class Progressions:
    """Entries of one kind, in order, each an arithmetic progression of lines.

    Args:
        kind: ROW, COLUMN or DIAGONAL.
        entries: all entries of a section, checked.
    """

    def __init__(self, kind: int, entries: list[Entry]) -> None:
        self.kind = kind
        rows = [(start, step if count > 1 else 1, count) for own, start, step, count in entries if own == kind]
        self._start, self._step, self._count = np.array(rows, np.int64).reshape(-1, 3).T

    def spans(self, block: Block) -> tuple[Positions, Positions]:
        """For each entry, the numbers (first, behind the last) of its lines with an element in a block, not empty."""
        top, left, bottom, right = block
        least, most = ((top, bottom - 1), (left, right - 1), (left - bottom + 1, right - 1 - top))[self.kind]
        first = np.maximum(-((self._start - least) // self._step), 0)
        last = np.minimum((most - self._start) // self._step + 1, self._count)
        return first, np.maximum(last, first)

    def most_in(self, block: Block) -> float:
        """No fewer elements than the lines have in a block; 0 if there are none."""
        height, width = block[2] - block[0], block[3] - block[1]
        first, last = self.spans(block)
        return float((last - first).sum()) * (width, height, min(width, height))[self.kind]

    def positions_in(self, block: Block, columns: int) -> Positions:
        """The positions of the elements in a block that has few; those of diagonals may be in another order."""
        top, left, bottom, right = block
        first, last = self.spans(block)
        counts = last - first
        number = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        lines = np.repeat(self._start, counts) + np.repeat(self._step, counts) * number
        cells: Positions
        if self.kind == ROW:
            cells = lines[:, None] * columns + np.arange(left, right)
            return cells.reshape(-1)
        if self.kind == COLUMN:
            cells = np.arange(top, bottom)[:, None] * columns + lines
            return cells.reshape(-1)
        if (bottom - top) * lines.size <= 4 * WINDOW:
            row = np.arange(top, bottom)[:, None]
            column = row + lines
            cells = (row * columns + column)[(column >= left) & (column < right)]
            return cells
        start = np.maximum(top, left - lines)
        length = np.minimum(bottom, right - lines) - start
        row = np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)
        cells = row * columns + row + np.repeat(lines, length)
        return cells


def progressions(entries: list[Entry]) -> list[Progressions]:
    """The entries of each kind that there is."""
    return [Progressions(kind, entries) for kind in sorted({entry[0] for entry in entries})]


def positions_in(kinds: list[Progressions], block: Block, columns: int) -> Positions:
    """The positions of the elements in a block of a matrix, increasing."""
    return distinct(np.concatenate([kind.positions_in(block, columns) for kind in kinds]))


def blocks_of(kinds: list[Progressions], block: Block) -> Iterator[Block]:
    """Parts of a block that hold all its elements, in order: whole rows, or part of one.

    Each has at most a few `WINDOW` elements.  A part without elements is passed over whatever its size.
    """
    top, left, bottom, right = block
    most = sum(kind.most_in(block) for kind in kinds)
    if not most:
        return
    if most <= WINDOW or (bottom - top, right - left) == (1, 1):
        yield block
    elif bottom - top > 1:
        middle = (top + bottom) // 2
        yield from blocks_of(kinds, (top, left, middle, right))
        yield from blocks_of(kinds, (middle, left, bottom, right))
    else:
        middle = (left + right) // 2
        yield from blocks_of(kinds, (top, left, bottom, middle))
        yield from blocks_of(kinds, (top, middle, bottom, right))


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
    found = []
    for start, stop in ranges(max(positions.size - columns + 1, 0)):
        ends = positions[start + columns - 1 : stop + columns - 1]
        first = positions[start:stop][ends - positions[start:stop] == columns - 1]
        found.append(first[first % columns == 0] // columns)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _columns_of(positions: Positions, row: int, columns: int) -> Positions:
    """The columns that are listed in one row."""
    first, last = np.searchsorted(positions, [row * columns, (row + 1) * columns])
    return positions[first:last] - row * columns


def _whole_columns(positions: Positions, rows: int, columns: int) -> Positions:
    """Columns of which every element is listed; a few rows rule out others, up to a density of a half or so."""
    found = np.zeros(0, np.int64) if positions.size < rows else _columns_of(positions, 0, columns)
    for row in np.linspace(0, rows - 1, min(rows, _SAMPLED), dtype=np.int64)[1:]:
        if found.size:
            found = np.intersect1d(found, _columns_of(positions, int(row), columns), assume_unique=True)
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
    found = distinct(rest % columns - rest // columns)
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
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """Decodes one part of the matrix after the other."""
        entries, found = self._checked(data, nnz, shape), 0
        kinds, columns = progressions(entries), matrix_shape(shape)[1]
        for block in blocks_of(kinds, (0, 0, *matrix_shape(shape))):
            positions = positions_in(kinds, block, columns)
            found += positions.size
            if found > nnz:
                break
            for start, stop in ranges(positions.size):
                yield positions[start:stop]
        if found != nnz:
            raise FormatError("bad_index", f"{found} elements for {nnz} nonzeros")
        check_zero(data, data.size - registry.SLACK)

    def _checked(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> list[Entry]:
        """The entries, each checked, which list at most nnz elements of each kind."""
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
        return entries

    @staticmethod
    def _listed(entry: Entry, rows: int, columns: int, limit: int) -> int:
        """Elements on an entry's lines; may stop counting beyond `limit`."""
        kind, _, _, count = entry
        if kind != DIAGONAL:
            return count * (columns if kind == ROW else rows)
        if count > limit:  # every diagonal has an element
            return count
        return sum(
            int(np.sum(elements(kind, lines_of(entry, start, stop), rows, columns))) for start, stop in ranges(count)
        )

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Walks over the section from its start, which is small."""
        rank, parts = 0, [np.zeros(0, np.int64)]
        for positions in self.windows(data, nnz, shape):
            first, last = np.searchsorted(positions, [start, stop])
            rank += int(first)
            parts.append(positions[first:last])
        return rank, np.concatenate(parts)
