"""Kernels that go through all of the base's elements, of many tiles of many tensors in one launch (FORMAT.md, 4.7).

Elements of a tile are in groups.  The *order* of a launch is by tile, then by group, then by position.  A kernel counts
the elements of each group in each block, so that prefix sums tell where a block's elements are in that order.  What is
listed is marked there, in a bit for each element.  Other kernels find the mark of each element, and the positions of
those that are nonzeros.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.hotswap.from_base import Chunk, GroupTable, InGroups, TorchFromBase
from shiradelta.hotswap.pool import exclusive, within
from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import INT32, UINT8

Tensor = torch.Tensor
#: Elements of a program, which counts four groups in 16 bits each of a 64-bit number.
BLOCK = 1024
_BITS, _MASK, _EACH = tl.constexpr(16), tl.constexpr(0xFFFF), tl.constexpr(4)

#: The columns of a tile's row, all int64.
COLUMNS = (
    "base",  # address of its first element
    "size",  # elements
    "program",  # number of the program of its first block
    "blocks",  # how many it has
    "counts",  # number of its first count
    "groups",  # how many there are
    "start",  # number of its first element in the order
    "position",  # of its first element, in the tensor
    "classes",  # address of the class of each key, uint8; without lines, of its group
    "cells",  # with lines: address of the group of each class of row, of column and of element
    "class_count",
    "column_classes",
    "columns",
    "row",  # its first one
    "row_fields",  # address of the classes of the tensor's rows, in words
    "row_width",  # bits of each
    "column_fields",
    "column_width",
    "turned",  # address of a byte for each group: 1 where what is listed is no nonzero
)
(
    _BASE,
    _SIZE,
    _PROGRAM,
    _BLOCKS,
    _COUNTS,
    _GROUPS,
    _START,
    _POSITION,
    _CLASSES,
    _CELLS,
    _CLASS_COUNT,
    _COLUMN_CLASSES,
    _COLUMNS,
    _ROW,
    _ROW_FIELDS,
    _ROW_WIDTH,
    _COLUMN_FIELDS,
    _COLUMN_WIDTH,
    _TURNED,
) = map(tl.constexpr, range(len(COLUMNS)))
_WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def _block(tiles, tile_of, BLOCK: tl.constexpr):
    """(row of its tile, its number in the tile, its elements' numbers in the tile, which of them there are)."""
    row = tiles + tl.load(tile_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    block = tl.program_id(0) - tl.load(row + _PROGRAM).to(tl.int32)
    within = block * BLOCK + tl.arange(0, BLOCK)
    return row, block, within, within < tl.load(row + _SIZE)


@triton.jit
def _field(row, fields, width, number, inside):
    """The class of each line, from fields of a width."""
    bits = tl.load(row + width)
    at = number.to(tl.int64) * bits
    word = tl.load(row + fields).to(INT32) + (at >> 5)
    low = tl.load(word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(word + 1, mask=inside & ((at & 31) + bits > 32), other=0).to(tl.int64)
    return (((low | (high << 32)) >> (at & 31)) & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def _element(row, within, inside, SIZE: tl.constexpr):
    """The bits of elements."""
    return tl.load(pointer(tl.load(row + _BASE), SIZE) + within, mask=inside, other=0)


@triton.jit
def _group(row, within, inside, SIZE: tl.constexpr, LINES: tl.constexpr):
    """The group of each element."""
    shift: tl.constexpr = 8 * SIZE - 16 if SIZE > 2 else 0
    keys: tl.constexpr = 0x7FFF if SIZE > 1 else 0x7F
    key = (_element(row, within, inside, SIZE) >> shift).to(tl.int32) & keys
    group = tl.load(tl.load(row + _CLASSES).to(UINT8) + key, mask=inside, other=0).to(tl.int32)
    if LINES:
        columns = tl.load(row + _COLUMNS).to(tl.int32)
        line = tl.load(row + _ROW) + within // columns
        of_row = _field(row, _ROW_FIELDS, _ROW_WIDTH, line, inside)
        of_column = _field(row, _COLUMN_FIELDS, _COLUMN_WIDTH, within % columns, inside)
        cell = of_row * tl.load(row + _COLUMN_CLASSES).to(tl.int32) + of_column
        cell = cell * tl.load(row + _CLASS_COUNT).to(tl.int32) + group
        group = tl.load(tl.load(row + _CELLS).to(UINT8) + cell, mask=inside, other=0).to(tl.int32)
    return group


@triton.jit
def _ones(group, inside, first):
    """A one in the place of each element's group, if that is among the four from `first` on."""
    one = tl.full(group.shape, 1, tl.int64) << ((group % _EACH) * _BITS).to(tl.int64)
    return tl.where(inside & (group // _EACH == first // _EACH), one, 0)


@triton.jit
def count_kernel(tiles, tile_of, counts, SIZE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Counts elements: int32, of each tile [groups, blocks]."""
    row, block, within, inside = _block(tiles, tile_of, BLOCK)
    group = _group(row, within, inside, SIZE, LINES)
    count, blocks = tl.load(row + _GROUPS).to(tl.int32), tl.load(row + _BLOCKS)
    out = counts + tl.load(row + _COUNTS) + block
    for first in range(0, count, _EACH):
        sums = tl.sum(_ones(group, inside, first), 0)
        for each in tl.static_range(_EACH):
            found = ((sums >> (each * _BITS)) & _MASK).to(tl.int32)
            tl.store(out + (first + each) * blocks, found, mask=first + each < count)


@triton.jit
def _number(row, block, group, inside, starts):
    """The number of each element in the order; `starts` is what is before each of the counts."""
    rank = tl.full(group.shape, 0, tl.int32)
    for first in range(0, tl.load(row + _GROUPS).to(tl.int32), _EACH):
        ones = _ones(group, inside, first)
        sums = tl.cumsum(ones, 0) >> ((group % _EACH) * _BITS).to(tl.int64)
        rank = tl.where(ones != 0, (sums & _MASK).to(tl.int32), rank)
    before = starts + tl.load(row + _COUNTS) + group * tl.load(row + _BLOCKS) + block
    return tl.load(before, mask=inside, other=0) + rank - 1


@triton.jit(do_not_specialize=["count"])
def mark_kernel(listed, count, marks, BLOCK: tl.constexpr):
    """Sets the bits of `marks` that are listed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(listed + at, mask=at < count, other=0)
    one = (tl.full(number.shape, 1, tl.int64) << (number & 31).to(tl.int64)).to(tl.int32)
    tl.atomic_or(marks + (number >> 5), one, mask=at < count)


@triton.jit
def find_kernel(
    tiles, tile_of, starts, marks, found, counts, SIZE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    """Says in a bit for each element whether it is a nonzero, and counts them: int32 [programs]."""
    row, block, within, inside = _block(tiles, tile_of, BLOCK)
    group = _group(row, within, inside, SIZE, LINES)
    number = _number(row, block, group, inside, starts)
    mark = (tl.load(marks + (number >> 5), mask=inside, other=0) >> (number & 31)) & 1
    turned = tl.load(tl.load(row + _TURNED).to(UINT8) + group, mask=inside, other=0).to(tl.int32)
    bit = tl.where(inside, mark ^ turned, 0)
    tl.store(counts + tl.program_id(0), tl.sum(bit, 0))
    # No two lanes of a word have the same bit, so that their sum puts them together.
    bits = tl.reshape(bit << (within & 31), [BLOCK // 32, 32])
    words = tl.program_id(0).to(tl.int64) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(found + words, tl.sum(bits, 1))


@triton.jit(do_not_specialize=["most"])
def collect_kernel(tiles, tile_of, found, starts, most, positions, at, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes position and element of each nonzero, up to the `most`-th; `starts` is how many are before a program."""
    row, block, within, inside = _block(tiles, tile_of, BLOCK)
    lane = tl.arange(0, BLOCK)
    word = tl.load(found + tl.program_id(0).to(tl.int64) * (BLOCK // 32) + (lane >> 5))
    bit = (word >> (lane & 31)) & 1
    rank = tl.load(starts + tl.program_id(0)) + tl.cumsum(bit, 0) - 1
    there = inside & (bit == 1) & (rank < most)
    position = tl.load(row + _POSITION) + within
    tl.store(positions + rank, position.to(positions.dtype.element_ty), mask=there)
    tl.store(at + rank, _element(row, within, there, SIZE), mask=there)


@triton.jit
def place_kernel(tiles, tile_of, starts, values, placed, SIZE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Brings values in the order to the places of their elements."""
    row, block, within, inside = _block(tiles, tile_of, BLOCK)
    group = _group(row, within, inside, SIZE, LINES)
    number = _number(row, block, group, inside, starts)
    value = tl.load(values + number, mask=inside, other=0)
    tl.store(placed + tl.load(row + _START) + within, value, mask=inside)


class Tiles(NamedTuple):
    """Tiles on a device.

    Attributes:
        rows: int64 [tiles, columns].
        tile_of: int32, the tile of each program.
        lasts: int64, the number of each cell's last count; a cell is a group of a tile.
        elements: how many there are.
        counts: how many there are.
        size: bytes of an element.
        has_lines: whether a tile has classes of rows or columns.
    """

    rows: Tensor
    tile_of: Tensor
    lasts: Tensor
    elements: int
    counts: int
    size: int
    has_lines: bool

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray | int], size: int, has_lines: bool, device: torch.device) -> Tiles:
        """Makes the columns about programs, counts and the order, which follow from sizes and groups.

        Args:
            columns: the others; a number is that of all tiles, and one that is missing is 0.
            size: bytes of an element.
            has_lines: whether a tile has classes of rows or columns.
            device: where to.
        """
        sizes = np.asarray(columns["size"], np.int64)
        groups, blocks = np.broadcast_to(columns["groups"], sizes.shape), -(-sizes // BLOCK)
        made = {"blocks": blocks, "program": exclusive(blocks), "start": exclusive(sizes)}
        made["counts"] = exclusive(groups * blocks)
        every = {**columns, **made}
        rows = np.stack([np.broadcast_to(every.get(name, 0), sizes.shape) for name in COLUMNS], axis=1)
        tile = np.repeat(np.arange(sizes.size), groups)
        lasts = made["counts"][tile] + (within(groups) + 1) * blocks[tile] - 1
        each = torch.from_numpy(np.stack((np.arange(sizes.size), blocks))).to(device)
        return cls(
            torch.from_numpy(rows.astype(np.int64)).to(device),
            torch.repeat_interleave(each[0].int(), each[1], output_size=int(blocks.sum())),
            torch.from_numpy(lasts).to(device),
            int(sizes.sum()),
            int((groups * blocks).sum()),
            size,
            has_lines,
        )

    def run(self, kernel, *arguments, **kind) -> None:
        """Runs a program for each block."""
        launch(
            kernel, self.tile_of.numel(), self.rows.device, self.rows, self.tile_of, *arguments, SIZE=self.size, **kind
        )


def launch(kernel, programs: int, device: torch.device, *arguments, **kind) -> None:
    """Runs a kernel on a device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **kind, BLOCK=BLOCK)


class Counted:
    """The order of tiles' elements, by counting.

    Attributes:
        stops: int64, of each cell, where it ends in the order.
    """

    def __init__(self, tiles: Tiles) -> None:
        self._tiles, device = tiles, tiles.rows.device
        counts = torch.empty(tiles.counts, dtype=torch.int32, device=device)
        tiles.run(count_kernel, counts, LINES=tiles.has_lines)
        ends = counts.cumsum(0, dtype=torch.int32)
        self._starts = ends - counts
        self.stops = ends[tiles.lasts].long()

    def find(self, listed: Tensor) -> tuple[Tensor, Tensor]:
        """The nonzeros: (a bit for each element of each block, in int32 words; int32, how many each block has)."""
        tiles, device = self._tiles, self._starts.device
        marks = torch.zeros(tiles.elements // 32 + 1, dtype=torch.int32, device=device)
        if listed.numel():
            launch(mark_kernel, -(-listed.numel() // BLOCK), device, listed, listed.numel(), marks)
        programs = tiles.tile_of.numel()
        found = torch.empty(programs * (BLOCK // 32), dtype=torch.int32, device=device)
        counts = torch.empty(programs, dtype=torch.int32, device=device)
        tiles.run(find_kernel, self._starts, marks, found, counts, LINES=tiles.has_lines)
        return found, counts

    def collect(self, found: Tensor, counts: Tensor, most: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(positions in the tensors, int64 if `wide`, else int32; elements there; how many are up to each block).

        Args:
            found: of `find`.
            counts: of `find`.
            most: how many there should be.
            wide: positions take 64 bits.
        """
        device = found.device
        ends = counts.cumsum(0)
        positions = torch.zeros(most, dtype=torch.int64 if wide else torch.int32, device=device)
        at = torch.zeros(most, dtype=bits_dtype(self._tiles.size), device=device)
        self._tiles.run(collect_kernel, found, ends - counts, most, positions, at)
        return positions, at, ends

    def placed(self, listed: Tensor, values: Tensor) -> Tensor:
        """Int64 [elements]: the values of listed ones, given by their numbers in the order; 1 for the others."""
        in_order = torch.ones(self._tiles.elements, dtype=torch.int64, device=listed.device)
        in_order[listed] = values
        placed = torch.empty_like(in_order)
        self._tiles.run(place_kernel, self._starts, in_order, placed, LINES=self._tiles.has_lines)
        return placed


class CountedChunk(InGroups):
    """`InGroups` of one tensor, by counting."""

    def __init__(self, chunk: Chunk, table: GroupTable) -> None:
        base, size = chunk.base, chunk.size
        tiles = np.arange(-(-base.numel() // size))
        classes = table.classes if table.has_lines else table.cells[table.classes.long()]
        self._kept = base, classes, table.cells, table.turned.byte(), chunk.rows, chunk.columns
        base_, classes_, cells_, turned_, rows_, columns_ = (each.data_ptr() for each in self._kept)
        columns = {
            "base": base_ + tiles * size * base.element_size(),
            "size": np.minimum(base.numel() - tiles * size, size),
            "groups": table.turned.numel(),
            "position": tiles * size,
            "classes": classes_,
            "cells": cells_,
            "class_count": table.class_count,
            "column_classes": table.column_classes,
            "columns": chunk.columns.numel(),
            "row": tiles * (size // chunk.columns.numel()),
            "row_fields": rows_,
            "row_width": 32,
            "column_fields": columns_,
            "column_width": 32,
            "turned": turned_,
        }
        self._counted = Counted(Tiles.of(columns, base.element_size(), table.has_lines, base.device))
        self.stops = self._counted.stops

    def nonzeros(self, listed: Tensor) -> Tensor:
        found, counts = self._counted.find(listed)
        positions, _, _ = self._counted.collect(found, counts, int(counts.sum()), True)
        return positions


class TritonFromBase(TorchFromBase):
    """Reads the index codec FROM_BASE with kernels, which take a tenth of the memory of plain torch operations."""

    chunk, element_room = 1 << 26, 4

    def in_groups(self, chunk: Chunk, table: GroupTable) -> InGroups:
        return CountedChunk(chunk, table)
