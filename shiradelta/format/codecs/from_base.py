"""FROM_BASE: gaps among the elements of one density, which the base's elements tell (FORMAT.md, 4.7)."""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import Bytes, IndexCodec, check_zero, padded
from shiradelta.format.codecs.from_base_classes import BaseCounts, BaseGrid, choose
from shiradelta.format.codecs.tiles import Gaps, PartsReader, fields, tiles_are_possible, widths_and_gaps
from shiradelta.format.registry import IndexId

HEAD = registry.FROM_BASE_HEAD
_LOW = registry.TURNED - 1
#: Bytes that reading a section takes for each of its tiles, about; `tracemalloc` counts 52 to 60.
_TILE_ROOM = 64


class FromBase(IndexCodec):
    """The index codec FROM_BASE; what needs no base cannot read it."""

    id = IndexId.FROM_BASE
    name = "FROM_BASE"
    minor = 1
    needs_base = True
    #: Table and widths; nothing is listed.
    least = HEAD.size + 4 * 2 + registry.SLACK
    counts = BaseCounts()

    def size(self, positions: Positions, shape: tuple[int, ...]) -> None:
        """None: a writer that has the base calls `encode_on`."""

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether the smallest section fits; head and classes tell the rest."""
        return size >= self.least

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> NoReturn:
        raise AssertionError("size() tells")

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> NoReturn:
        raise FormatError("base_needed")

    def decode_between(self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int) -> NoReturn:
        raise FormatError("base_needed")

    def lead(self, data: Bytes, nnz: int, numel: int) -> int:
        return data.size - grid_and_gaps(data, numel)[1].low.nbytes

    def room(self, data: Bytes, numel: int) -> int:
        """Bytes of memory that `decode_on` takes for tiles; a section of 40 bytes may have one for each element."""
        *_, tile_rows, columns, _ = HEAD.unpack_from(data.data)
        tiles: int = numel // max(tile_rows * columns, 1)
        return _TILE_ROOM * tiles

    def encode_on(self, positions: Positions, shape: tuple[int, ...], base: Array) -> bytes | None:
        """The section, given all elements' bits of the base, flat; None where a row does not fit in a tile."""
        grid = choose(positions, shape, base, self.counts)
        return None if grid is None else _with_equal_widths(self.encode_in(positions, grid, base), grid)

    def encode_in(self, positions: Positions, grid: BaseGrid, base: Array) -> bytes:
        """The section of these positions in this grid."""
        size, count, keys = grid.tile_rows * grid.columns, grid.numbers.size, []
        edges = np.searchsorted(positions, np.arange(grid.tiles + 1) * size)
        turned = np.flatnonzero(grid.numbers >= registry.TURNED)
        for tile in range(grid.tiles):
            group = grid.groups_of(tile, base[tile * size : (tile + 1) * size])
            listed = np.isin(group, turned) if turned.size else np.zeros(group.size, np.bool_)
            listed[positions[edges[tile] : edges[tile + 1]] - tile * size] ^= True
            chosen = np.argsort(group, kind="stable")
            starts = np.append(0, np.cumsum(np.bincount(group, minlength=count)))
            at = np.flatnonzero(listed[chosen])
            of_group = group[chosen[at]].astype(np.int64)
            keys.append((tile * count + of_group) * registry.MAX_BASE_TILE + at - starts[of_group])
        k = (grid.numbers & _LOW).astype(np.int64)
        widths, rest, bits = widths_and_gaps(np.concatenate(keys), k, grid.tiles, registry.MAX_BASE_TILE)
        return b"".join(
            (
                HEAD.pack(
                    grid.row_bits, grid.column_bits, grid.thresholds.size + 1, 0, grid.tile_rows, grid.columns, bits
                ),
                padded(grid.thresholds.astype("<u2").tobytes()),
                padded(grid.groups.tobytes()),
                widths,
                fields(grid.row_class, grid.row_bits),
                fields(grid.column_class, grid.column_bits),
                rest,
            )
        )

    def decode_on(self, data: Bytes, nnz: int, shape: tuple[int, ...], base: Array) -> Positions:
        """int64 [nnz], given all elements' bits of the base, flat.

        Raises:
            FormatError: the section is damaged, or was made for another base.
        """
        grid, gaps = grid_and_gaps(data, math.prod(shape))
        size, count, found = grid.tile_rows * grid.columns, grid.numbers.size, []
        # Low tiles are read together: a small section may well have a tile for each element.
        step = max(registry.MAX_BASE_TILE // max(size, count), 1)
        for first in range(0, grid.tiles, step):
            last = min(first + step, grid.tiles)
            sound, ones = gaps.sound(first, last)
            of_element = grid.groups_of(first, base[first * size : sound * size])
            several = np.arange(of_element.size) // size * count if last - first > 1 else 0
            of_tile = of_element + several
            chosen = np.argsort(of_tile, kind="stable")
            stops = np.cumsum(np.bincount(of_tile, minlength=(sound - first) * count))
            starts = np.append(0, stops[:-1])
            listed = gaps.orders(first, sound, ones)
            group = listed.tile * count + gaps.groups[listed.group]
            at = starts[group] + listed.order
            if np.any(at >= stops[group]):
                raise FormatError(
                    "wrong_base", f"one of tiles {first} to {last - 1} lists more of a class than there is"
                )
            if sound < last:
                raise FormatError("bad_index", f"unary bits of tile {sound}")
            is_nonzero = (grid.numbers >= registry.TURNED)[of_element]
            is_nonzero[chosen[at]] ^= True
            found.append(np.flatnonzero(is_nonzero) + first * size)
        positions = np.concatenate(found)
        check_end(gaps, positions.size, nnz)
        return positions


def check_end(gaps: Gaps, found: int, nnz: int) -> None:
    """Checks what can be told when all tiles have been read.

    Args:
        gaps: of the section.
        found: how many nonzeros its tiles have.
        nnz: how many there should be.

    Raises:
        FormatError: padding is not zero, or the section was made for another base.
    """
    if not gaps.unused_bits_are_zero():
        raise FormatError("padding_not_zero", "unused bits of a part")
    check_zero(gaps.unary, gaps.end)
    if found != nnz:
        raise FormatError("wrong_base", f"{found} nonzeros of {nnz}")


def _with_equal_widths(section: bytes, grid: BaseGrid) -> bytes:
    """A section whose only tile has fields of equal widths, which a packed file has for nothing: each has a word."""
    if grid.tiles > 1:
        return section
    at = HEAD.size + len(padded(bytes(2 * grid.thresholds.size))) + len(padded(bytes(grid.groups.size)))
    result = np.frombuffer(section, np.uint8).copy()
    widths = result[at : at + 1 + grid.numbers.size]
    widths[widths > 0] = registry.MAX_BASE_TILE_FIELD
    return result.tobytes()


def grid_and_gaps(data: Bytes, numel: int) -> tuple[BaseGrid, Gaps]:
    """A section taken apart.  Raises FormatError where the parts contradict each other or the size."""
    row_bits, column_bits, classes, reserved, tile_rows, columns, all_unary = HEAD.unpack_from(data.data)
    if (
        max(row_bits, column_bits) > registry.MAX_CLASS_BITS
        or not 0 < classes <= registry.MAX_BASE_CLASSES
        or reserved
        or not tiles_are_possible(numel, columns, tile_rows, registry.MAX_BASE_TILE)
    ):
        raise FormatError("bad_index", f"tiles of {tile_rows} x {columns} elements, or bits of classes")
    taken = PartsReader(data, HEAD.size)
    thresholds = taken.numbers(2 * (classes - 1)).view("<u2")
    if np.any(thresholds[1:] < thresholds[:-1]):
        raise FormatError("bad_index", "thresholds decrease")
    groups = taken.numbers(classes << (row_bits + column_bits))
    if np.any(groups & _LOW > registry.MAX_RICE_K):
        raise FormatError("bad_index", f"k is {(groups & _LOW).max()}")
    numbers = np.unique(groups)
    widths = taken.numbers(1 + numbers.size)
    if widths.max() > registry.MAX_BASE_TILE_FIELD:
        raise FormatError("bad_index", f"a field of {widths.max()} bits")
    row_class = taken.fields(numel // columns, row_bits).astype(np.uint8)
    column_class = taken.fields(columns, column_bits).astype(np.uint8)
    cells = groups.reshape(1 << row_bits, 1 << column_bits, classes)
    grid = BaseGrid(columns, tile_rows, row_class, row_bits, column_class, column_bits, thresholds, cells)
    k = (numbers & _LOW).astype(np.int64)
    gaps = Gaps.read(taken, widths, k, grid.tiles, all_unary, registry.MAX_BASE_TILE)
    if gaps.unary_starts[-1] != all_unary:
        raise FormatError("bad_index", f"{gaps.unary_starts[-1]} unary bits of {all_unary}")
    return grid, gaps
