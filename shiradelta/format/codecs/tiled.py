"""TILED: gaps among the elements of one density in a tile of rows (FORMAT.md, 4.6)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes, IndexCodec, between, check_zero, padded
from shiradelta.format.codecs.tiled_classes import (
    CountsInLines,
    Grid,
    choose,
    counts_in_lines,
    lines_differ,
    pays_for_lines,
)
from shiradelta.format.codecs.tiles import Gaps, PartsReader, Small, fields, tiles_are_possible, widths_and_gaps
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import WINDOW

HEAD = registry.TILED_HEAD
#: The most rows and cells of tiles that are decoded at once, where the tiles are several.
_MOST_LINES = 1 << 20


@dataclass(frozen=True)
class _TiledLayout:
    """The order of a matrix's elements: in each tile by k, then by class of row and of column, then by row and column.

    A *cell* is the elements of a tile whose rows are of one class and whose columns are of one class.  Cells are
    numbered by tile, then as the table of k is.
    """

    grid: Grid

    @property
    def cells(self) -> int:
        """Cells of a tile."""
        return self.grid.k.size

    @cached_property
    def ks(self) -> Small:
        """The different k, increasing."""
        return np.unique(self.grid.k)

    @cached_property
    def columns(self) -> Positions:
        """int64, all columns by class, then in order."""
        return np.argsort(self.grid.column_class, kind="stable")

    @cached_property
    def first_columns(self) -> Positions:
        """int64, where each class begins in `columns`, and its end."""
        counts = np.bincount(self.grid.column_class, minlength=1 << self.grid.column_bits)
        return np.append(0, np.cumsum(counts))

    def tiles_of(self, first: int, last: int) -> _Tiles:
        """The order of the elements of tiles first to last - 1."""
        grid = self.grid
        start, stop = first * grid.tile_rows, min(last * grid.tile_rows, grid.rows)
        group = np.arange(stop - start) // grid.tile_rows << grid.row_bits
        group += grid.row_class[start:stop]
        counts = np.bincount(group, minlength=(last - first) << grid.row_bits)
        return _Tiles(self, np.argsort(group, kind="stable"), np.append(0, np.cumsum(counts)), group)


@dataclass(frozen=True)
class _Tiles:
    """Some consecutive tiles."""

    layout: _TiledLayout
    rows: Positions  # by tile, then by class, then in order; from 0 at the first tile
    first_rows: Positions  # where each class of each tile begins in `rows`, and the end
    group: Positions  # of each row: tile and class as one number

    def before(self, k: int) -> Positions:
        """int64, how many elements of this k lie before each cell of these tiles, and in all of them."""
        sizes = np.outer(np.diff(self.first_rows), np.diff(self.layout.first_columns))
        table = self.layout.grid.k == k
        of_k = np.where(np.tile(table, (sizes.shape[0] // table.shape[0], 1)), sizes, 0)
        return np.append(0, np.cumsum(of_k))


@dataclass(frozen=True)
class _TiledParts:
    """A section taken apart; sizes are checked."""

    layout: _TiledLayout
    gaps: Gaps

    @classmethod
    def of(cls, data: Bytes, nnz: int, numel: int) -> _TiledParts:
        """Raises FormatError where the parts before low contradict each other or the size."""
        row_bits, column_bits, reserved, tile_rows, columns, all_unary = HEAD.unpack_from(data.data)
        if (
            not 1 <= min(row_bits, column_bits) <= max(row_bits, column_bits) <= registry.MAX_CLASS_BITS
            or reserved
            or not tiles_are_possible(numel, columns, tile_rows, registry.MAX_TILE)
        ):
            raise FormatError("bad_index", f"tiles of {tile_rows} x {columns} elements, or bits of classes")
        taken = PartsReader(data, HEAD.size)
        k = taken.numbers(1 << (row_bits + column_bits)).reshape(1 << row_bits, 1 << column_bits)
        if k.max() > registry.MAX_RICE_K:
            raise FormatError("bad_index", f"k is {k.max()}")
        widths = taken.numbers(1 + np.unique(k).size)
        if widths.max() > registry.MAX_TILE_FIELD:
            raise FormatError("bad_index", f"a field of {widths.max()} bits")
        row_class = taken.fields(numel // columns, row_bits).astype(np.uint8)
        column_class = taken.fields(columns, column_bits).astype(np.uint8)
        layout = _TiledLayout(Grid(columns, tile_rows, row_class, row_bits, column_class, column_bits, k))
        gaps = Gaps.read(taken, widths, layout.ks.astype(np.int64), layout.grid.tiles, all_unary, registry.MAX_TILE)
        if gaps.ranks[-1] != nnz or gaps.unary_starts[-1] != all_unary:
            raise FormatError(
                "bad_index", f"{gaps.ranks[-1]} nonzeros of {nnz}, {gaps.unary_starts[-1]} unary bits of {all_unary}"
            )
        return cls(layout, gaps)

    def positions(self, first: int, last: int) -> Positions:
        """int64, increasing, of tiles first to last - 1.

        Raises:
            FormatError: a tile is damaged.
        """
        sound, ones = self.gaps.sound(first, last)
        result = self._positions(first, sound, ones)
        if sound < last:
            raise FormatError("bad_index", f"unary bits of tile {sound}")
        return result

    def _positions(self, first: int, last: int, ones: Positions) -> Positions:
        """As `positions`, given the ones of tiles whose numbers of ones are right."""
        layout, grid = self.layout, self.layout.grid
        listed = self.gaps.orders(first, last, ones)
        tiles, positions = layout.tiles_of(first, last), np.empty(ones.size, np.int64)
        for number, value in enumerate(self.gaps.ks.tolist()):
            chosen = np.flatnonzero(listed.group == number)
            if not chosen.size:
                continue
            before, tile = tiles.before(value), listed.tile[chosen]
            edges = before[:: layout.cells]
            order = listed.order[chosen] + edges[tile]
            if np.any(order >= edges[tile + 1]):
                raise FormatError("position_range", f"an element outside of its tile, from tile {first} on")
            cell = np.searchsorted(before, order, side="right") - 1
            group, column_class = np.divmod(cell, 1 << grid.column_bits)
            first_column = layout.first_columns[column_class]
            row, column = np.divmod(order - before[cell], layout.first_columns[column_class + 1] - first_column)
            row = first * grid.tile_rows + tiles.rows[tiles.first_rows[group] + row]
            positions[chosen] = row * grid.columns + layout.columns[first_column + column]
        return np.sort(positions)


class Tiled(IndexCodec):
    """The index codec TILED."""

    id = IndexId.TILED
    name = "TILED"
    minor = 1
    #: Seven words: table, widths, both classes, size and count of one tile, one of unary bits.
    least = HEAD.size + 4 * 7 + registry.SLACK

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Positions], tuple[int, ...], tuple[Grid, bool] | None] | None = None

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """None also where it would save too little to be worth a slower decoder."""
        if math.prod(shape) < registry.BLOCK_BITS or not pays_for_lines(positions.size, shape):
            return None
        counts = counts_in_lines(positions, shape)
        if not lines_differ(counts, positions.size):
            return None
        chosen = self._choose(positions, shape, counts)
        return self.size_in(positions, chosen[0]) if chosen and chosen[1] else None

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether the smallest section fits; head and classes tell the rest."""
        return size >= self.least

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        chosen = self._choose(positions, shape)
        assert chosen is not None, "size() tells"
        return self.encode_in(positions, chosen[0])

    def size_in(self, positions: Positions, grid: Grid) -> int:
        """Bytes of `encode_in`'s result."""
        return len(self.encode_in(positions, grid))

    def encode_in(self, positions: Positions, grid: Grid) -> bytes:
        """The section of these positions in this grid."""
        return _encode(positions, grid)

    def _choose(
        self, positions: Positions, shape: tuple[int, ...], counts: CountsInLines | None = None
    ) -> tuple[Grid, bool] | None:
        """What `choose` says, which is asked once for the positions' size and their encoding."""
        if positions.flags.writeable:  # then they may be others the next time
            return choose(positions, shape, counts)
        known = self._last
        if known is None or known[0]() is not positions or known[1] != shape:
            known = self._last = weakref.ref(positions), shape, choose(positions, shape, counts)
        return known[2]

    def lead(self, data: Bytes, nnz: int, numel: int) -> int:
        return data.size - _TiledParts.of(data, nnz, numel).gaps.low.nbytes

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """Decodes several tiles at once, as many as tables of rows and cells and a window of nonzeros have room for."""
        parts = _TiledParts.of(data, nnz, math.prod(shape))
        grid, gaps = parts.layout.grid, parts.gaps
        most = max(_MOST_LINES // max(grid.tile_rows, parts.layout.cells), 1)
        first = 0
        while first < grid.tiles:
            by_rank = np.searchsorted(gaps.ranks, gaps.ranks[first] + WINDOW, side="right")
            by_bits = np.searchsorted(gaps.unary_starts, gaps.unary_starts[first] + 8 * WINDOW, side="right")
            last = min(max(int(min(by_rank, by_bits)) - 1, first + 1), first + most)
            yield parts.positions(first, last)
            first = last
        if not gaps.unused_bits_are_zero():
            raise FormatError("padding_not_zero", "unused bits of a part")
        check_zero(gaps.unary, gaps.end)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Decodes only the tiles that can hold the range."""
        parts = _TiledParts.of(data, nnz, math.prod(shape))
        tile = parts.layout.grid.tile_rows * parts.layout.grid.columns
        first = min(start // tile, parts.layout.grid.tiles - 1)
        last = max(-(-stop // tile), first + 1)
        skip, inside = between(parts.positions(first, last), start, stop)
        return int(parts.gaps.ranks[first]) + skip, inside


def _encode(positions: Positions, grid: Grid) -> bytes:
    """The section of these positions in this grid."""
    layout = _TiledLayout(grid)
    ks = layout.ks
    row, column = np.divmod(positions, grid.columns)
    tile = row // grid.tile_rows
    of_k = np.searchsorted(ks, grid.k)[grid.row_class[row], grid.column_class[column]]
    tiles = layout.tiles_of(0, grid.tiles)
    column_class = grid.column_class[column].astype(np.int64)
    order = _ranks(tiles.rows, tiles.first_rows, tiles.group)[row] * np.diff(layout.first_columns)[column_class]
    order += _ranks(layout.columns, layout.first_columns, grid.column_class)[column]
    cell = (tiles.group[row] << grid.column_bits) + column_class
    for number, value in enumerate(ks.tolist()):
        chosen = np.flatnonzero(of_k == number)
        before = tiles.before(value)
        order[chosen] += before[cell[chosen]] - before[tile[chosen] * layout.cells]
    # No tile has more elements than MAX_TILE, so that one number sorts by tile, k and order.
    keys = np.sort((tile * ks.size + of_k) * registry.MAX_TILE + order)
    widths, rest, unary_bits = widths_and_gaps(keys, ks.astype(np.int64), grid.tiles, registry.MAX_TILE)
    return b"".join(
        (
            HEAD.pack(grid.row_bits, grid.column_bits, 0, grid.tile_rows, grid.columns, unary_bits),
            padded(grid.k.tobytes()),
            widths,
            fields(grid.row_class, grid.row_bits),
            fields(grid.column_class, grid.column_bits),
            rest,
        )
    )


def _ranks(lines: Positions, first: Positions, group: Positions | Small) -> Positions:
    """The number of each line within its group, given all lines by group and where each group begins."""
    ranks = np.empty(lines.size, np.int64)
    ranks[lines] = np.arange(lines.size)
    return ranks - first[group]
