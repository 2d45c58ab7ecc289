"""Gaps in tiles, Rice coded with a k for each group of elements: what TILED and FROM_BASE share (FORMAT.md, 4.6, 4.7).

A tile is some whole rows of a matrix.  Its elements are in *groups*, which are numbered alike in all tiles, and each
group has a k.  Which elements those are, and in which order, is the codec's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes, padded
from shiradelta.format.codecs.packing import Words, field_words, find_ones, pack_bitmap, pack_fields, unpack_fields

#: Small whole numbers: classes, or k.
Small = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Lines:
    """A tensor seen as a matrix, in tiles of whole rows, with classes of rows and columns.

    Attributes:
        columns: elements of a row.
        tile_rows: rows of a tile.
        row_class: class of each row.
        row_bits: bits of such a class.
        column_class: class of each column.
        column_bits: bits of such a class.
    """

    columns: int
    tile_rows: int
    row_class: Small
    row_bits: int
    column_class: Small
    column_bits: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.row_class.size

    @property
    def tiles(self) -> int:
        """Tiles of the matrix."""
        return -(-self.rows // self.tile_rows)


def tiles_are_possible(numel: int, columns: int, tile_rows: int, largest: int) -> bool:
    """Whether a tensor of so many elements has tiles of `tile_rows` whole rows, of at most `largest` elements."""
    return columns > 0 and numel % columns == 0 and 0 < tile_rows <= numel // columns and tile_rows * columns <= largest


class PartsReader:
    """Takes the parts of a section that lie before low, one after the other.

    Attributes:
        data: the section.
        at: where the next part starts.
        padding_is_zero: whether all padding and unused bits so far are zero.
    """

    def __init__(self, data: Bytes, at: int) -> None:
        self.data, self.at = data, at
        self.padding_is_zero = True

    def _take(self, size: int) -> Bytes:
        part = self.data[self.at : self.at + size]
        if part.size < size:
            raise FormatError("bad_size", f"{self.data.size} bytes end within classes or sizes of tiles")
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
        if count == 1:  # most tensors have one tile, and many parts of one field
            return (words & np.uint32((1 << width) - 1)).astype(np.int64)
        return unpack_fields(words, width, 0, count)


class Orders(NamedTuple):
    """What some consecutive tiles list: by tile, then by group, then increasing.

    Attributes:
        tile: of each, from 0 at the first of these tiles.
        group: of each, an index of `Gaps.groups`.
        order: its number among the tile's elements of the group, from 0; where the section is damaged, perhaps more
            than there are.
    """

    tile: Positions
    group: Positions
    order: Positions


@dataclass(frozen=True)
class Gaps:
    """Sizes, counts, low and unary of a section; sizes are checked.

    Attributes:
        unary_bits: [tiles].
        groups: those with bits for their counts, increasing, numbered as the reader was given them.
        ks: int64, the k of each of them.
        counts: [tiles, these groups], how many elements are listed.
        low: the low bits, and what follows.
        unary: the unary bits, and the slack.
        end: where the slack starts in `unary`.
        padding_is_zero: of everything before low.
        largest: the most elements of a tile.
    """

    unary_bits: Positions
    groups: Positions
    ks: Positions
    counts: Positions
    low: Words
    unary: Bytes
    end: int
    padding_is_zero: bool
    largest: int

    @classmethod
    def read(cls, taken: PartsReader, widths: Small, ks: Positions, tiles: int, all_unary: int, largest: int) -> Gaps:
        """Takes all parts from the sizes of tiles on.

        Args:
            taken: has taken what is before.
            widths: bits of a tile's size, and of its count of each group.
            ks: int64, the k of each group.
            tiles: how many there are.
            all_unary: unary bits of all tiles.
            largest: the most elements of a tile.

        Raises:
            FormatError: a part ends beyond the section, or they are not all of it.
        """
        data = taken.data
        unary_bits = taken.fields(tiles, int(widths[0]))
        # What has no bits in the file takes no memory either.
        groups = np.flatnonzero(widths[1:])
        counts = [taken.fields(tiles, int(widths[1 + group])) for group in groups]
        listed = np.array([count.sum() for count in counts], np.int64)
        low = taken.at
        unary = low + 4 * field_words(1, int(listed @ ks[groups]))
        end = unary + 4 * -(-all_unary // 32)
        if end + registry.SLACK != data.size:
            raise FormatError("bad_size", f"{data.size} bytes for {all_unary} unary bits")
        sizes = np.stack(counts, axis=1) if counts else np.zeros((tiles, 0), np.int64)
        low_words = data[low:].view("<u4")
        return cls(
            unary_bits, groups, ks[groups], sizes, low_words, data[unary:], end - unary, taken.padding_is_zero, largest
        )

    @cached_property
    def ranks(self) -> Positions:
        """How many elements are listed before each tile, and all."""
        return np.append(0, np.cumsum(self.counts.sum(axis=1)))

    @cached_property
    def low_starts(self) -> Positions:
        """Bits of low before each tile, and all."""
        return np.append(0, np.cumsum(self.counts @ self.ks))

    @cached_property
    def unary_starts(self) -> Positions:
        """Unary bits before each tile, and all."""
        return np.append(0, np.cumsum(self.unary_bits))

    def sound(self, first: int, last: int) -> tuple[int, Positions]:
        """(the first of tiles first to last - 1 with damaged unary bits, or last; the ones of those before it)."""
        begin, end = int(self.unary_starts[first]), int(self.unary_starts[last])
        ones = find_ones(self.unary[begin // 8 : -(-end // 8)]) + (begin & ~7)
        ones = ones[slice(*np.searchsorted(ones, (begin, end)))]
        starts = self.unary_starts[first : last + 1]
        of_tile = np.searchsorted(ones, starts)
        whole = np.diff(of_tile) == np.diff(self.ranks[first : last + 1])
        # The last unary bit of a tile is a one; index -1 is of a tile without ones, which must not have bits.
        last_ones = np.append(ones, -1)[np.where(np.diff(of_tile) > 0, of_tile[1:] - 1, -1)]
        whole &= (last_ones == starts[1:] - 1) | (np.diff(starts) == 0)
        stop = last if whole.all() else first + int(np.argmin(whole))
        return stop, ones[: of_tile[stop - first]]

    def orders(self, first: int, last: int, ones: Positions) -> Orders:
        """What tiles first to last - 1 list, given their ones, whose number is right."""
        ks, counts = self.ks, self.counts[first:last]
        group = np.repeat(np.tile(np.arange(ks.size), last - first), counts.ravel())
        tile = np.repeat(np.arange(last - first), counts.sum(axis=1))
        zeros = np.diff(ones, prepend=-1) - 1
        tile_starts = np.flatnonzero(np.diff(tile, prepend=-1))
        zeros[tile_starts] = ones[tile_starts] - self.unary_starts[first + tile[tile_starts]]
        k = ks[group]
        at = int(self.low_starts[first]) + np.cumsum(k) - k
        words = self.low[at >> 5].astype(np.uint64) | self.low[(at >> 5) + 1].astype(np.uint64) << np.uint64(32)
        low = (words >> (at & 31).astype(np.uint64)).astype(np.int64) & ((1 << k) - 1)
        # No gap is larger than a tile; what a damaged one says must not overflow the sums.
        steps = np.minimum((zeros << k) + low, self.largest) + 1
        sums = np.append(0, np.cumsum(steps))
        ends = np.cumsum(counts.ravel())
        starts = ends - counts.ravel()
        return Orders(tile, group, sums[1:] - 1 - np.repeat(sums[starts], counts.ravel()))

    def unused_bits_are_zero(self) -> bool:
        """Whether all padding and unused bits are zero."""
        low, unary = int(self.low_starts[-1]), int(self.unary_starts[-1])
        return (
            self.padding_is_zero
            and not (low % 32 and self.low[low // 32] >> (low % 32))
            and not np.any(find_ones(self.unary[unary // 8 : self.end]) >= unary % 8)
        )


def widths_and_gaps(keys: Positions, ks: Positions, tiles: int, largest: int) -> tuple[bytes, bytes, int]:
    """(the widths, the parts from the sizes of tiles to the slack, the number of unary bits).

    Args:
        keys: int64, (tile * groups + group) * largest + order of each listed element, increasing.
        ks: int64, the k of each group.
        tiles: how many there are.
        largest: the most elements of a tile.
    """
    group, order = np.divmod(keys, largest)
    gaps = np.diff(order, prepend=0) - 1
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    gaps[starts] = order[starts]
    k = ks[group % ks.size]
    unary = (gaps >> k) + 1
    ones, low_ends = np.cumsum(unary) - 1, np.cumsum(k)
    low = np.zeros(int(k.sum()), np.uint8)
    for bit in range(int(k.max(initial=0))):
        has = np.flatnonzero(k > bit)
        low[low_ends[has] - k[has] + bit] = gaps[has] >> bit & 1
    counts = np.bincount(group, minlength=tiles * ks.size).reshape(tiles, ks.size)
    sizes = np.bincount(group // ks.size, weights=unary, minlength=tiles).astype(np.int64)
    columns = [sizes, *counts.T]
    widths = [int(column.max()).bit_length() for column in columns]
    bits = int(unary.sum())
    parts = [fields(column, width) for column, width in zip(columns, widths, strict=True)]
    parts += [pack_bitmap(np.flatnonzero(low), low.size), pack_bitmap(ones, bits), SLACK]
    return padded(bytes(widths)), b"".join(parts), bits


def fields(numbers: Positions | Small, width: int) -> bytes:
    """`numbers` packed into words; nothing if they have no bits."""
    if not width:
        return b""
    return numbers.astype("<u4").tobytes() if numbers.size == 1 else pack_fields(numbers, width)
