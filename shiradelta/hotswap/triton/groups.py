"""Kernels that go through all of the base's elements, of many tiles of many tensors in one launch (FORMAT.md, 4.7).

Elements of a tile are in groups.  The *order* of a launch is by tile, then by group, then by position.  A kernel counts
the elements of each group in each block, so that prefix sums tell where a block's elements are in that order.  What is
listed is marked there, in a bit for each element.  Other kernels find the mark of each element, and the positions of
those that are nonzeros.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import INT32, UINT8

#: Elements of a program, and of a row, which a thread has: the counts of 16 groups in it take 4 bits each.
BLOCK = 1024
ROW = tl.constexpr(8)
#: Elements and bytes of which sizes and addresses of tiles mostly are multiples; a kernel for these is faster.
ALIGNMENT = tl.constexpr(16)

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
        size = tl.multiple_of(size, ALIGNMENT)
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
        base = tl.multiple_of(base, ALIGNMENT)
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
