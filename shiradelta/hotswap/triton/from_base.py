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
from shiradelta.hotswap.bits_there import sent
from shiradelta.hotswap.from_base import Chunk, GroupTable, InGroups, TorchFromBase
from shiradelta.hotswap.pool import exclusive, within
from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import INT32, UINT8

Tensor = torch.Tensor
#: Elements of a program, and of a row, which a thread has: the counts of 16 groups in it take 4 bits each.
BLOCK = 1024
ROW = tl.constexpr(8)
#: Elements and bytes of which sizes and addresses of tiles mostly are multiples; a kernel for these is faster.
_ALIGNMENT = tl.constexpr(16)
#: Words of bits of a program that goes through nonzeros.
_WORDS = 1024

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
def _block(tiles, tile_of, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(row of its tile, its number in the tile, its elements' numbers in the tile, which of them there are)."""
    row = tiles + tl.load(tile_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    block = tl.program_id(0) - tl.load(row + _PROGRAM).to(tl.int32)
    lanes = tl.arange(0, BLOCK // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    within, size = block * BLOCK + lanes, tl.load(row + _SIZE).to(tl.int32)
    if ALIGNED:  # so that a thread has the elements of a row
        size = tl.multiple_of(size, _ALIGNMENT)
    return row, block, within, within < size


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
def _element(row, within, inside, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The bits of elements."""
    base = pointer(tl.load(row + _BASE), SIZE)
    if ALIGNED:
        base = tl.multiple_of(base, _ALIGNMENT)
    return tl.load(base + within, mask=inside, other=0)


@triton.jit
def _group(row, within, inside, SIZE: tl.constexpr, LINES: tl.constexpr, ALIGNED: tl.constexpr):
    """The group of each element."""
    shift: tl.constexpr = 8 * SIZE - 16 if SIZE > 2 else 0
    keys: tl.constexpr = 0x7FFF if SIZE > 1 else 0x7F
    key = (_element(row, within, inside, SIZE, ALIGNED) >> shift).to(tl.int32) & keys
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
    """A one in the place of each element's group, if that is among the 16 from `first` on."""
    at = group - first
    one = tl.full(group.shape, 1, tl.int64) << (4 * (at & 15)).to(tl.int64)
    return tl.where(inside & (at >= 0) & (at < 16), one, 0)


@triton.jit
def _apart(rows, number):
    """Four counts of each row, of 4 bits, in 16 bits each; number counts such fours."""
    some = rows >> (16 * number)
    return (some & 0xF) | ((some & 0xF0) << 12) | ((some & 0xF00) << 24) | ((some & 0xF000) << 36)


@triton.jit
def count_kernel(
    tiles, tile_of, counts, SIZE: tl.constexpr, LINES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts elements: int32, of each tile [groups, blocks]."""
    row, block, within, inside = _block(tiles, tile_of, ALIGNED, BLOCK)
    group = _group(row, within, inside, SIZE, LINES, ALIGNED)
    count, blocks = tl.load(row + _GROUPS).to(tl.int32), tl.load(row + _BLOCKS)
    out = counts + tl.load(row + _COUNTS) + block
    for first in range(0, count, 16):
        rows = tl.sum(_ones(group, inside, first), 1)
        for four in tl.static_range(4):
            if first + 4 * four < count:
                sums = tl.sum(_apart(rows, four), 0)
                for each in tl.static_range(4):
                    number = first + 4 * four + each
                    tl.store(out + number * blocks, ((sums >> (16 * each)) & 0xFFFF).to(tl.int32), mask=number < count)


@triton.jit
def _number(row, block, group, inside, starts):
    """The number of each element in the order; `starts` is what is before each of the counts."""
    rank, count = tl.full(group.shape, 0, tl.int32), tl.load(row + _GROUPS).to(tl.int32)
    for first in range(0, count, 16):
        ones = _ones(group, inside, first)
        at = group - first
        rows, in_row = tl.sum(ones, 1), tl.cumsum(ones, 1)
        above = tl.full(group.shape, 0, tl.int64)
        for four in tl.static_range(4):
            if first + 4 * four < count:
                some = _apart(rows, four)
                above = tl.where((at >> 2) == four, (tl.cumsum(some, 0) - some)[:, None], above)
        own = (in_row >> (4 * (at & 15)).to(tl.int64)) & 15
        here = own + ((above >> (16 * (at & 3)).to(tl.int64)) & 0xFFFF)
        rank = tl.where(ones != 0, here.to(tl.int32), rank)
    before = starts + tl.load(row + _COUNTS) + (group * tl.load(row + _BLOCKS).to(tl.int32) + block)
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
    tiles,
    tile_of,
    starts,
    marks,
    found,
    counts,
    TURNED: tl.constexpr,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Says in a bit for each element whether it is a nonzero, in uint8 [programs, rows], and counts them in int32."""
    row, block, within, inside = _block(tiles, tile_of, ALIGNED, BLOCK)
    group = _group(row, within, inside, SIZE, LINES, ALIGNED)
    number = _number(row, block, group, inside, starts)
    mark = (tl.load(marks + (number >> 5), mask=inside, other=0) >> (number & 31)) & 1
    if TURNED:
        mark ^= tl.load(tl.load(row + _TURNED).to(UINT8) + group, mask=inside, other=0).to(tl.int32)
    bit = tl.where(inside, mark, 0)
    rows = tl.sum(bit, 1)
    tl.store(counts + tl.program_id(0), tl.sum(rows, 0))
    # No two lanes of a row have the same bit, so that their sum puts them together.
    at = tl.program_id(0).to(tl.int64) * (BLOCK // ROW) + tl.arange(0, BLOCK // ROW)
    tl.store(found + at, tl.sum(bit << (within & (ROW - 1)), 1).to(tl.uint8))


@triton.jit
def _bit_count(word):
    """How many bits of int32 are set."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["words", "most"])
def collect_kernel(
    tiles,
    tile_of,
    found,
    words,
    starts,
    most,
    positions,
    at,
    SIZE: tl.constexpr,
    OF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes position and element of each nonzero, up to the `most`-th.

    `found` has the bits of all blocks, in int32 words, and `starts` tells how many are before each block.  A program
    goes through BLOCK words, of several tiles perhaps.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(found + number, mask=number < words, other=0)
    block = number // (OF_BLOCK // 32)
    row = tiles + tl.load(tile_of + block, mask=word != 0, other=0).to(tl.int64) * _WIDTH
    within = (block - tl.load(row + _PROGRAM, mask=word != 0, other=0)) * OF_BLOCK + number % (OF_BLOCK // 32) * 32
    base = tl.load(row + _BASE, mask=word != 0, other=0)
    position = tl.load(row + _POSITION, mask=word != 0, other=0)
    counts = _bit_count(word)
    rank = tl.load(starts + tl.program_id(0) * (BLOCK // (OF_BLOCK // 32))) + tl.cumsum(counts, 0) - counts
    while tl.max(counts, 0) > 0:
        bit = _bit_count((word & -word) - 1)
        there = (counts > 0) & (rank < most)
        tl.store(positions + rank, (position + within + bit).to(positions.dtype.element_ty), mask=there)
        tl.store(at + rank, tl.load(pointer(base, SIZE) + within + bit, mask=there, other=0), mask=there)
        word = word & (word - 1)
        rank += 1
        counts -= 1


@triton.jit
def place_kernel(
    tiles,
    tile_of,
    starts,
    values,
    placed,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Brings values in the order to the places of their elements."""
    row, block, within, inside = _block(tiles, tile_of, ALIGNED, BLOCK)
    group = _group(row, within, inside, SIZE, LINES, ALIGNED)
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
        has_turned: whether what a tile lists of a group may be no nonzeros.
        is_aligned: whether sizes and addresses of all tiles are multiples of 16.
    """

    rows: Tensor
    tile_of: Tensor
    lasts: Tensor
    elements: int
    counts: int
    size: int
    has_lines: bool
    has_turned: bool
    is_aligned: bool

    @classmethod
    def of(
        cls,
        columns: Mapping[str, np.ndarray | int],
        size: int,
        device: torch.device,
        *,
        has_lines: bool = False,
        has_turned: bool = False,
    ) -> Tiles:
        """Makes the columns about programs, counts and the order, which follow from sizes and groups.

        Args:
            columns: the others; a number is that of all tiles, and one that is missing is 0.
            size: bytes of an element.
            device: where to.
            has_lines: whether a tile has classes of rows or columns.
            has_turned: whether what a tile lists of a group may be no nonzeros.
        """
        sizes = np.asarray(columns["size"], np.int64)
        groups, blocks = np.broadcast_to(columns["groups"], sizes.shape), -(-sizes // BLOCK)
        made = {"blocks": blocks, "program": exclusive(blocks), "start": exclusive(sizes)}
        made["counts"] = exclusive(groups * blocks)
        every = {**columns, **made}
        rows = np.stack([np.broadcast_to(every.get(name, 0), sizes.shape) for name in COLUMNS], axis=1)
        tile = np.repeat(np.arange(sizes.size), groups)
        lasts = made["counts"][tile] + (within(groups) + 1) * blocks[tile] - 1
        each = sent(np.stack((np.arange(sizes.size), blocks)), device)
        return cls(
            sent(rows.astype(np.int64), device),
            torch.repeat_interleave(each[0].int(), each[1], output_size=int(blocks.sum())),
            sent(lasts, device),
            int(sizes.sum()),
            int((groups * blocks).sum()),
            size,
            has_lines,
            has_turned,
            not np.any((sizes | columns["base"]) % _ALIGNMENT.value),
        )

    def run(self, kernel, *arguments) -> None:
        """Runs a program for each block."""
        kind = {"SIZE": self.size, "LINES": self.has_lines, "ALIGNED": self.is_aligned}
        launch(kernel, self.tile_of.numel(), self.rows.device, self.rows, self.tile_of, *arguments, **kind)


def launch(kernel, programs: int, device: torch.device, *arguments, **kind) -> None:
    """Runs a kernel on a device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **{"BLOCK": BLOCK, **kind})


class Counted:
    """The order of tiles' elements, by counting.

    Attributes:
        stops: int64, of each cell, where it ends in the order.
    """

    def __init__(self, tiles: Tiles) -> None:
        self._tiles, device = tiles, tiles.rows.device
        counts = torch.empty(tiles.counts, dtype=torch.int32, device=device)
        tiles.run(count_kernel, counts)
        ends = counts.cumsum(0, dtype=torch.int32)
        self._starts = ends - counts
        self.stops = ends[tiles.lasts].long()

    def no_marks(self) -> Tensor:
        """int32, a bit for each element in the order, none of them set."""
        return torch.zeros(self._tiles.elements // 32 + 1, dtype=torch.int32, device=self._starts.device)

    def marks(self, listed: Tensor) -> Tensor:
        """`no_marks` with the bits of these numbers set."""
        marks = self.no_marks()
        if listed.numel():
            launch(mark_kernel, -(-listed.numel() // BLOCK), marks.device, listed, listed.numel(), marks)
        return marks

    def find(self, marks: Tensor) -> tuple[Tensor, Tensor]:
        """The nonzeros, given what is listed: (a bit for each element of each block, int32; int32, how many it has)."""
        tiles, device = self._tiles, self._starts.device
        programs = tiles.tile_of.numel()
        found = torch.empty(programs * (BLOCK // 8), dtype=torch.uint8, device=device)
        counts = torch.empty(programs, dtype=torch.int32, device=device)
        tiles.run(find_kernel, self._starts, marks, found, counts, self._tiles.has_turned)
        return found.view(torch.int32), counts

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
        tiles, words = (self._tiles.rows, self._tiles.tile_of), found.numel()
        given = *tiles, found, words, ends - counts, most, positions, at
        kind = {"SIZE": self._tiles.size, "OF_BLOCK": BLOCK, "BLOCK": _WORDS}
        launch(collect_kernel, -(-words // _WORDS), device, *given, **kind)
        return positions, at, ends

    def placed(self, listed: Tensor, values: Tensor) -> Tensor:
        """[elements]: the values of listed ones, given by their numbers in the order; 1 for the others."""
        in_order = torch.ones(self._tiles.elements, dtype=values.dtype, device=listed.device)
        in_order[listed] = values
        placed = torch.empty_like(in_order)
        self._tiles.run(place_kernel, self._starts, in_order, placed)
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
        self._counted = Counted(
            Tiles.of(columns, base.element_size(), base.device, has_lines=table.has_lines, has_turned=True)
        )
        self.stops = self._counted.stops

    def nonzeros(self, listed: Tensor) -> Tensor:
        found, counts = self._counted.find(self._counted.marks(listed))
        positions, _, _ = self._counted.collect(found, counts, int(counts.sum()), True)
        return positions


class TritonFromBase(TorchFromBase):
    """Reads the index codec FROM_BASE with kernels, which take a tenth of the memory of plain torch operations."""

    chunk, element_room = 1 << 26, 4

    def in_groups(self, chunk: Chunk, table: GroupTable) -> InGroups:
        return CountedChunk(chunk, table)
