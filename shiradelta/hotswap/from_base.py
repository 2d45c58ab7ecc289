"""FROM_BASE in torch operations, on the device that has the base's elements: they do not leave it (FORMAT.md, 4.7)."""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import FROM_BASE
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.base_classes import KEYS
from shiradelta.format.codecs.from_base import HEAD, check_end, grid_and_gaps
from shiradelta.format.codecs.from_base_classes import BaseGrid
from shiradelta.format.codecs.tiles import Gaps
from shiradelta.hotswap.bits_there import bits_of, fields_at, sent
from shiradelta.io.restored import Elements, Located

Tensor = torch.Tensor
#: Bytes for each byte of a section, whose unary bits become numbers of 8 bytes.
_SECTION_ROOM = 80


class Chunk(NamedTuple):
    """Some consecutive tiles.

    Attributes:
        rows: the class of each row; int32, like all of these.
        columns: the class of each column.
        size: elements of a tile; the last one may have fewer.
        base: the bits of their elements, flat, as torch's integers.
    """

    rows: Tensor
    columns: Tensor
    size: int
    base: Tensor


class GroupTable(NamedTuple):
    """The group of each element, as tables on the device.

    Attributes:
        classes: uint8 [keys], the class of elements of a key.
        cells: uint8 [row classes, column classes, classes], flat: the groups.
        class_count: classes of elements.
        column_classes: how many there are.
        turned: bool, of each group.
        thresholds: int32, of keys, on the host.
        has_lines: whether there are several classes of rows or columns.
    """

    classes: Tensor
    cells: Tensor
    class_count: int
    column_classes: int
    turned: Tensor
    thresholds: NDArray[np.int32]
    has_lines: bool

    @classmethod
    def of(cls, grid: BaseGrid, device: torch.device) -> GroupTable:
        """Copies the tables of a grid to a device."""
        cells = np.searchsorted(grid.numbers, grid.groups).astype(np.uint8).reshape(-1)
        classes, cells_there, turned = (
            torch.from_numpy(each).to(device) for each in (grid.class_of, cells, grid.numbers >= registry.TURNED)
        )
        thresholds, has_lines = grid.thresholds.astype(np.int32), grid.row_bits + grid.column_bits > 0
        return cls(classes, cells_there, thresholds.size + 1, 1 << grid.column_bits, turned, thresholds, has_lines)


class InGroups(Protocol):
    """The elements of a chunk by tile, then by group, then by position.

    Attributes:
        sizes: integers [tiles * groups], how many elements each cell has: a group of a tile.
    """

    sizes: Tensor

    def nonzeros(self, cells: Tensor, ranks: Tensor) -> Tensor:
        """int64, increasing: the nonzeros' positions in the chunk.

        Args:
            cells: int32, of each listed element, by tile, then by group.
            ranks: int32, its number in its cell, by position, less than the cell's size.
        """


class Sorted(InGroups):
    """`InGroups` by sorting, in plain torch operations."""

    def __init__(self, chunk: Chunk, table: GroupTable) -> None:
        columns, count = chunk.columns.numel(), table.turned.numel()
        cells = table.classes[keys_of(chunk.base)]
        if table.has_lines:
            of_lines = chunk.rows[:, None] * table.column_classes + chunk.columns
            cells = cells + (of_lines * table.class_count).view(-1)
        self._group, self._turned = table.cells[cells.int()], table.turned
        del cells
        tiles = -(-chunk.base.numel() // chunk.size)
        dtype = torch.uint8 if tiles * count <= 256 else torch.int32  # bytes sort fastest
        of_row = torch.arange(chunk.rows.numel(), device=chunk.base.device) // (chunk.size // columns) * count
        cell = self._group.view(-1, columns).to(dtype) + of_row.to(dtype)[:, None]
        cells, self._order = cell.view(-1).sort(stable=True)
        every = torch.arange(tiles * count, device=cells.device).to(dtype)
        stops = torch.searchsorted(cells, every, right=True)
        self.sizes = stops.diff(prepend=stops.new_zeros(1))

    def nonzeros(self, cells: Tensor, ranks: Tensor) -> Tensor:
        found = self._turned[self._group.int()]
        at = self._order[(self.sizes.cumsum(0) - self.sizes)[cells] + ranks]
        found[at] = ~found[at]
        return found.nonzero().view(-1)


def keys_of(bits: Tensor) -> Tensor:
    """int32: the keys of elements (FORMAT.md, 4.7), given their bits in torch's integers."""
    width = 8 * bits.element_size()
    return ((bits >> max(width - 16, 0)) & ((1 << min(width - 1, 15)) - 1)).int()


def classes_there(thresholds: NDArray[np.int32], device: torch.device) -> Tensor:
    """uint8 [tensors, keys], on a device: how many thresholds of each tensor are at most each key."""
    keys = torch.arange(KEYS, dtype=torch.int32, device=device).expand(thresholds.shape[0], KEYS).contiguous()
    found = torch.searchsorted(sent(thresholds, device), keys, right=True, out_int32=True)
    return found.to(torch.uint8)


class TorchFromBase:
    """Reads the index codec FROM_BASE in torch operations.

    Attributes:
        chunk: elements that are looked at together, about, in whole tiles.
        element_room: bytes that each of them takes meanwhile, about.
    """

    chunk, element_room = 1 << 22, 48

    def in_groups(self, chunk: Chunk, table: GroupTable) -> InGroups:
        """The elements of a chunk in the order in which groups have them."""
        return Sorted(chunk, table)

    def room(self, data: Bytes, numel: int) -> int:
        """The fewest bytes of memory that `decode` takes beside its result: those of one tile."""
        *_, tile_rows, columns, _ = HEAD.unpack_from(data.data)
        return self._fixed(data, numel) + self.element_room * min(numel, tile_rows * columns)

    @staticmethod
    def _fixed(data: Bytes, numel: int) -> int:
        return FROM_BASE.room(data, numel) + _SECTION_ROOM * data.size

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...], base: Tensor, room: int | None = None) -> Tensor:
        """The positions: int32 [nnz], int64 where numel takes it, on the device of the base.

        Args:
            data: the section.
            nnz: how many nonzeros there are.
            shape: the tensor's.
            base: all elements' bits, flat, in the integers of `bits_dtype`.
            room: bytes of memory that it may take beside its result; None for as many as make it fast.

        Raises:
            FormatError: the section is damaged, or was made for another base.
        """
        numel = math.prod(shape)
        grid, gaps = grid_and_gaps(data, numel)
        device, count, size = base.device, grid.numbers.size, grid.tile_rows * grid.columns
        table, bits = GroupTable.of(grid, device), _Bits.of(gaps, device)
        rows, columns = (
            torch.from_numpy(each.astype(np.int32)).to(device) for each in (grid.row_class, grid.column_class)
        )
        result = torch.empty(nnz, dtype=torch.int32 if numel <= 1 << 31 else torch.int64, device=device)
        most = self.chunk if room is None else min(self.chunk, (room - self._fixed(data, numel)) // self.element_room)
        # A low tile takes room for its groups, too.
        step, total = max(most // max(size, 16 * count), 1), 0
        for first in range(0, grid.tiles, step):
            last = min(first + step, grid.tiles)
            sound, ones = bits.sound(first, last)
            if sound > first:
                of_rows = rows[first * grid.tile_rows : sound * grid.tile_rows]
                chunk = Chunk(of_rows, columns, size, base[first * size : sound * size])
                elements = self.in_groups(chunk, table)
                cells, ranks = bits.ranks(first, sound, ones, count)
                if bool((ranks >= elements.sizes[cells]).any()):
                    raise FormatError("wrong_base", "a tile lists more elements than it has")
                positions = elements.nonzeros(cells.int(), ranks.int())
                end = total + positions.numel()
                if end <= nnz:  # later tiles may still say what is wrong with the section
                    result[total:end] = positions + first * size
                total = end
            if sound < last:
                raise FormatError("bad_index", f"unary bits of tile {sound}")
        check_end(gaps, total, nnz)
        return result


class _Bits(NamedTuple):
    """Low and unary of a section on the device; the rest of `Gaps` is small and stays with NumPy."""

    gaps: Gaps
    low: Tensor  # int32
    unary: Tensor  # uint8

    @classmethod
    def of(cls, gaps: Gaps, device: torch.device) -> _Bits:
        """Copies both to a device."""
        low = torch.from_numpy(gaps.low.view("<i4").copy()).to(device)
        return cls(gaps, low, torch.from_numpy(gaps.unary.copy()).to(device))

    def sound(self, first: int, last: int) -> tuple[int, Tensor]:
        """As `Gaps.sound`, but that ones count from the first unary bit of these tiles."""
        starts = self.gaps.unary_starts[first : last + 1]
        begin, end = int(starts[0]), int(starts[-1])
        bits = bits_of(self.unary[begin // 8 : -(-end // 8)])
        ones = bits[begin % 8 : begin % 8 + end - begin].nonzero().view(-1)
        edges = self._there(np.stack((starts - begin, self.gaps.ranks[first : last + 1])))
        of_tile = torch.searchsorted(ones, edges[0])
        whole = of_tile.diff() == edges[1].diff()
        # The last unary bit of a tile is a one; a tile without ones must not have bits.
        last_ones = torch.cat((ones, ones.new_tensor([-1])))[torch.where(of_tile.diff() > 0, of_tile[1:] - 1, -1)]
        whole &= (last_ones == edges[0, 1:] - 1) | (edges[0].diff() == 0)
        if bool(whole.all()):
            return last, ones
        stop = first + int((~whole).nonzero()[0])
        return stop, ones[: int(of_tile[stop - first])]

    def ranks(self, first: int, last: int, ones: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """(tile * groups + group of each listed element, its number in the group), given the number of all groups."""
        gaps = self.gaps
        counts, tiles = gaps.counts[first:last].reshape(-1), np.arange(last - first)
        firsts = np.cumsum(counts) - counts
        ks = np.tile(gaps.ks, tiles.size)
        cells = (tiles[:, None] * groups + gaps.groups).reshape(-1)
        lows = int(gaps.low_starts[first]) + np.cumsum(counts * ks) - counts * ks
        small = self._there(np.stack((counts, firsts, ks, cells, lows)))
        which = torch.repeat_interleave(small[0], output_size=ones.numel())
        _, begins, k, cell, low_at = small[:, which]
        at = low_at + (torch.arange(ones.numel(), device=ones.device) - begins) * k
        low = fields_at(self.low, at, k)
        # The last unary bit before a tile is a one, so its first gap needs no care.
        zeros = ones.diff(prepend=ones.new_tensor([-1])) - 1
        # No gap is larger than a tile; what a damaged one says must not overflow the sums.
        steps = ((zeros << k) + low).clamp(max=gaps.largest) + 1
        sums = torch.cat((steps.new_zeros(1), steps.cumsum(0)))
        return cell, sums[1:] - 1 - sums[begins]

    def _there(self, numbers: Positions) -> Tensor:
        return torch.from_numpy(numbers).to(self.unary.device)


class ElementsThere(Elements):
    """All elements of a base, on the device that has them.

    Args:
        codec: decodes there.
        bits: of all of them, flat, as torch's integers.
    """

    def __init__(self, codec: TorchFromBase, bits: Tensor) -> None:
        self._codec, self._bits = codec, bits

    @property
    def size(self) -> int:
        return self._bits.numel()

    @property
    def itemsize(self) -> int:
        return self._bits.element_size()

    def room(self, data: Bytes) -> int:
        return self._codec.room(data, self.size)

    def positions(self, data: Bytes, nnz: int, shape: tuple[int, ...], room: int) -> Tensor:
        """Those that `decode` gives, where the elements are; arguments are the same."""
        return self._codec.decode(data, nnz, shape, self._bits, room)

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...], room: int) -> Located:
        positions = self.positions(data, nnz, shape, room)
        at = self._taken(positions)
        return Located(positions.cpu().numpy().astype(np.int64, copy=False), at)

    def at(self, positions: Positions) -> Array:
        return self._taken(torch.from_numpy(positions).to(self._bits.device))

    def _taken(self, positions: Tensor) -> Array:
        found: Array = self._bits[positions].cpu().numpy()
        return found.view(f"<u{self.itemsize}")
