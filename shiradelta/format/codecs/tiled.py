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
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, between, check_zero, padded
from shiradelta.format.codecs.packing import Words, field_words, find_ones, pack_bitmap, pack_fields, unpack_fields
from shiradelta.format.codecs.tiled_classes import Grid, Small, choose, pays_for_lines
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
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.grid.row_class.size

    @property
    def tiles(self) -> int:
        """Tiles of the matrix."""
        return -(-self.rows // self.grid.tile_rows)

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
        start, stop = first * grid.tile_rows, min(last * grid.tile_rows, self.rows)
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


class _TiledReader:
    """Takes the parts of a section that lie before low, one after the other.

    Attributes:
        at: where the next part starts.
        padding_is_zero: whether all padding and unused bits so far are zero.
    """

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self.at = HEAD.size
        self.padding_is_zero = True

    def _take(self, size: int) -> Bytes:
        part = self._data[self.at : self.at + size]
        if part.size < size:
            raise FormatError("bad_size", f"{self._data.size} bytes end within classes or sizes of tiles")
        self.at += size
        return part

    def numbers(self, count: int) -> Small:
        """`count` bytes, padded to whole words."""
        part = self._take(registry.align(count, 4))
        self.padding_is_zero &= not part[count:].any()
        return part[:count]

    def fields(self, count: int, width: int) -> Positions:
        """int64, `count` fields of `width` bits."""
        words = self._take(4 * field_words(count, width)).view("<u4")
        if not width:
            return np.zeros(count, np.int64)
        self.padding_is_zero &= not (count * width % 32 and words[-1] >> (count * width % 32))
        return unpack_fields(words, width, 0, count)


@dataclass(frozen=True)
class _TiledParts:
    """A section taken apart; sizes are checked."""

    layout: _TiledLayout
    unary_bits: Positions  # [tiles]
    ks: Positions  # int64, those that have nonzeros, increasing
    counts: Positions  # [tiles, these k]
    low: Words  # with what follows
    unary: Bytes  # with the slack
    end: int  # where the slack starts
    padding_is_zero: bool  # of everything before low

    @classmethod
    def of(cls, data: Bytes, nnz: int, numel: int) -> _TiledParts:
        """Raises FormatError where the parts before low contradict each other or the size."""
        row_bits, column_bits, reserved, tile_rows, columns, all_unary = HEAD.unpack_from(data.data)
        if (
            not 1 <= min(row_bits, column_bits) <= max(row_bits, column_bits) <= registry.MAX_CLASS_BITS
            or reserved
            or not columns
            or numel % columns
            or not 0 < tile_rows <= numel // columns
            or tile_rows * columns > registry.MAX_TILE
        ):
            raise FormatError("bad_index", f"tiles of {tile_rows} x {columns} elements, or bits of classes")
        taken = _TiledReader(data)
        k = taken.numbers(1 << (row_bits + column_bits)).reshape(1 << row_bits, 1 << column_bits)
        if k.max() > registry.MAX_RICE_K:
            raise FormatError("bad_index", f"k is {k.max()}")
        widths = taken.numbers(1 + np.unique(k).size)
        if widths.max() > registry.MAX_TILE_FIELD:
            raise FormatError("bad_index", f"a field of {widths.max()} bits")
        row_class = taken.fields(numel // columns, row_bits).astype(np.uint8)
        column_class = taken.fields(columns, column_bits).astype(np.uint8)
        layout = _TiledLayout(Grid(columns, tile_rows, row_class, row_bits, column_class, column_bits, k))
        unary_bits = taken.fields(layout.tiles, int(widths[0]))
        # What has no bits in the file takes no memory either.
        ks = layout.ks[widths[1:] > 0].astype(np.int64)
        counts = [taken.fields(layout.tiles, int(width)) for width in widths[1:] if width]
        of_k = np.array([count.sum() for count in counts], np.int64)
        low = taken.at
        unary = low + 4 * field_words(1, int(of_k @ ks))
        end = unary + 4 * -(-all_unary // 32)
        if end + registry.SLACK != data.size:
            raise FormatError("bad_size", f"{data.size} bytes for {all_unary} unary bits")
        if of_k.sum() != nnz or unary_bits.sum() != all_unary:
            raise FormatError("bad_index", f"{of_k.sum()} nonzeros of {nnz}, {unary_bits.sum()} unary bits")
        low_words, sizes = data[low:].view("<u4"), np.stack(counts, axis=1)
        return cls(layout, unary_bits, ks, sizes, low_words, data[unary:], end, taken.padding_is_zero)

    @cached_property
    def ranks(self) -> Positions:
        """Nonzeros before each tile, and all."""
        return np.append(0, np.cumsum(self.counts.sum(axis=1)))

    @cached_property
    def low_starts(self) -> Positions:
        """Bits of low before each tile, and all."""
        return np.append(0, np.cumsum(self.counts @ self.ks))

    @cached_property
    def unary_starts(self) -> Positions:
        """Unary bits before each tile, and all."""
        return np.append(0, np.cumsum(self.unary_bits))

    def positions(self, first: int, last: int) -> Positions:
        """int64, increasing, of tiles first to last - 1.

        Raises:
            FormatError: a tile is damaged.
        """
        begin, end = int(self.unary_starts[first]), int(self.unary_starts[last])
        ones = find_ones(self.unary[begin // 8 : -(-end // 8)]) + (begin & ~7)
        ones = ones[slice(*np.searchsorted(ones, (begin, end)))]
        starts = self.unary_starts[first : last + 1]
        of_tile = np.searchsorted(ones, starts)
        whole = np.diff(of_tile) == np.diff(self.ranks[first : last + 1])
        # The last unary bit of a tile is a one; index -1 is of a tile without ones, which must not have bits.
        last_ones = np.append(ones, -1)[np.where(np.diff(of_tile) > 0, of_tile[1:] - 1, -1)]
        whole &= (last_ones == starts[1:] - 1) | (np.diff(starts) == 0)
        sound = last if whole.all() else first + int(np.argmin(whole))
        result = self._positions(first, sound, ones[: of_tile[sound - first]])
        if sound < last:
            raise FormatError("bad_index", f"unary bits of tile {sound}")
        return result

    def _positions(self, first: int, last: int, ones: Positions) -> Positions:
        """As `positions`, given the ones of tiles whose numbers of ones are right."""
        layout, grid = self.layout, self.layout.grid
        ks, counts = self.ks, self.counts[first:last]
        of_k = np.repeat(np.tile(np.arange(ks.size), last - first), counts.ravel())
        tile = np.repeat(np.arange(last - first), counts.sum(axis=1))
        zeros = np.diff(ones, prepend=-1) - 1
        tile_starts = np.flatnonzero(np.diff(tile, prepend=-1))
        zeros[tile_starts] = ones[tile_starts] - self.unary_starts[first + tile[tile_starts]]
        k = ks[of_k]
        at = int(self.low_starts[first]) + np.cumsum(k) - k
        words = self.low[at >> 5].astype(np.uint64) | self.low[(at >> 5) + 1].astype(np.uint64) << np.uint64(32)
        low = (words >> (at & 31).astype(np.uint64)).astype(np.int64) & ((1 << k) - 1)
        # No gap is larger than a tile; what a damaged one says must not overflow the sums.
        steps = np.minimum((zeros << k) + low, registry.MAX_TILE) + 1
        sums = np.append(0, np.cumsum(steps))
        group_ends = np.cumsum(counts.ravel())
        inside = sums[1:] - 1 - np.repeat(sums[group_ends - counts.ravel()], counts.ravel())
        tiles, positions = layout.tiles_of(first, last), np.empty(ones.size, np.int64)
        for number, value in enumerate(ks.tolist()):
            chosen = np.flatnonzero(of_k == number)
            if not chosen.size:
                continue
            before = tiles.before(value)
            edges = before[:: layout.cells]
            order = inside[chosen] + edges[tile[chosen]]
            if np.any(order >= edges[tile[chosen] + 1]):
                raise FormatError("position_range", f"an element outside of its tile, from tile {first} on")
            cell = np.searchsorted(before, order, side="right") - 1
            group, column_class = np.divmod(cell, 1 << grid.column_bits)
            first_column = layout.first_columns[column_class]
            row, column = np.divmod(order - before[cell], layout.first_columns[column_class + 1] - first_column)
            row = first * grid.tile_rows + tiles.rows[tiles.first_rows[group] + row]
            positions[chosen] = row * grid.columns + layout.columns[first_column + column]
        return np.sort(positions)

    def unused_bits_are_zero(self) -> bool:
        """Whether all padding and slack is zero."""
        low, unary = int(self.low_starts[-1]), int(self.unary_starts[-1])
        return (
            self.padding_is_zero
            and not (low % 32 and self.low[low // 32] >> (low % 32))
            and not np.any(find_ones(self.unary[unary // 8 : self.end]) >= unary % 8)
        )


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
        chosen = self._choose(positions, shape)
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

    def _choose(self, positions: Positions, shape: tuple[int, ...]) -> tuple[Grid, bool] | None:
        """What `choose` says, which is asked once for the positions' size and their encoding."""
        if positions.flags.writeable:  # then they may be others the next time
            return choose(positions, shape)
        known = self._last
        if known is None or known[0]() is not positions or known[1] != shape:
            known = self._last = weakref.ref(positions), shape, choose(positions, shape)
        return known[2]

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """Decodes several tiles at once, as many as tables of rows and cells and a window of nonzeros have room for."""
        parts = _TiledParts.of(data, nnz, math.prod(shape))
        grid = parts.layout.grid
        most = max(_MOST_LINES // max(grid.tile_rows, parts.layout.cells), 1)
        first = 0
        while first < parts.layout.tiles:
            by_rank = np.searchsorted(parts.ranks, parts.ranks[first] + WINDOW, side="right")
            by_bits = np.searchsorted(parts.unary_starts, parts.unary_starts[first] + 8 * WINDOW, side="right")
            last = min(max(int(min(by_rank, by_bits)) - 1, first + 1), first + most)
            yield parts.positions(first, last)
            first = last
        if not parts.unused_bits_are_zero():
            raise FormatError("padding_not_zero", "unused bits of a part")
        check_zero(data, parts.end)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Decodes only the tiles that can hold the range."""
        parts = _TiledParts.of(data, nnz, math.prod(shape))
        tile = parts.layout.grid.tile_rows * parts.layout.grid.columns
        first = min(start // tile, parts.layout.tiles - 1)
        last = max(-(-stop // tile), first + 1)
        skip, inside = between(parts.positions(first, last), start, stop)
        return int(parts.ranks[first]) + skip, inside


def _encode(positions: Positions, grid: Grid) -> bytes:
    """The section of these positions in this grid."""
    layout = _TiledLayout(grid)
    ks = layout.ks
    row, column = np.divmod(positions, grid.columns)
    tile = row // grid.tile_rows
    of_k = np.searchsorted(ks, grid.k)[grid.row_class[row], grid.column_class[column]]
    tiles = layout.tiles_of(0, layout.tiles)
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
    group, order = np.divmod(keys, registry.MAX_TILE)
    gaps = np.diff(order, prepend=0) - 1
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    gaps[starts] = order[starts]
    k = ks[group % ks.size].astype(np.int64)
    unary = (gaps >> k) + 1
    ones, low_ends = np.cumsum(unary) - 1, np.cumsum(k)
    low = np.zeros(int(low_ends[-1]), np.uint8)
    for bit in range(int(k.max())):
        has = np.flatnonzero(k > bit)
        low[low_ends[has] - k[has] + bit] = gaps[has] >> bit & 1
    counts = np.bincount(group, minlength=layout.tiles * ks.size).reshape(layout.tiles, ks.size)
    sizes = np.bincount(group // ks.size, weights=unary, minlength=layout.tiles).astype(np.int64)
    columns = [sizes, *counts.T]
    widths = [int(column.max()).bit_length() for column in columns]
    return b"".join(
        (
            HEAD.pack(grid.row_bits, grid.column_bits, 0, grid.tile_rows, grid.columns, int(ones[-1]) + 1),
            padded(grid.k.tobytes()),
            padded(bytes(widths)),
            _fields(grid.row_class, grid.row_bits),
            _fields(grid.column_class, grid.column_bits),
            *(_fields(column, width) for column, width in zip(columns, widths, strict=True)),
            pack_bitmap(np.flatnonzero(low), low.size),
            pack_bitmap(ones, int(ones[-1]) + 1),
            SLACK,
        )
    )


def _ranks(lines: Positions, first: Positions, group: Positions | Small) -> Positions:
    """The number of each line within its group, given all lines by group and where each group begins."""
    ranks = np.empty(lines.size, np.int64)
    ranks[lines] = np.arange(lines.size)
    return ranks - first[group]


def _fields(fields: Positions | Small, width: int) -> bytes:
    """`fields` packed into words; nothing if they have no bits."""
    return pack_fields(fields, width) if width else b""
