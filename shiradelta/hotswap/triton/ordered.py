"""Kernels that go through all of the base's elements, of many tiles of many tensors in one launch (FORMAT.md, 4.7).

Elements of a tile are in groups, and a group of a tile is a cell.  A kernel counts the elements of each group in each
strip of a tile, and in parts of these.  The place of an element then follows from its number in its cell, by position,
by two searches and a look at one part, so that what takes long is done for listed elements only.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.format.codecs.base_classes import KEYS
from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import INT32, INT64, UINT8

#: Elements of a program; of a strip, which counts are of; of a part of a strip, which a thread counts, in 8 bits for a
#: group; and of a row of a part, in 4 bits.
BLOCK, STRIP, PART = 4096, 1024, 32
ROW = tl.constexpr(8)
#: Groups whose counts of parts are together.
TOGETHER = tl.constexpr(8)
#: Elements and bytes of which sizes and addresses of tiles mostly are multiples; a kernel for these is faster.
ALIGNMENT = tl.constexpr(16)
_KEYS = tl.constexpr(KEYS)

#: The columns of a tile's row, all int64.
COLUMNS = (
    "base",  # address of its first element
    "size",  # elements
    "program",  # number of the program of its first block
    "strips",  # how many it has
    "counts",  # number of its first count
    "groups",  # how many there are
    "cell",  # number of its first cell: a cell is a group of a tile
    "parts",  # number of the parts of its first strip
    "start",  # number of its first element
    "position",  # of its first element, in the tensor
    "buckets",  # address of the buckets of keys, which tell classes; without lines, groups
    "ones",  # address of int64 [16 groups, buckets]: a one in the place of the group; 0 if there are lines or cuts
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
    _STRIPS,
    _COUNTS,
    _GROUPS,
    _CELL,
    _PARTS,
    _START,
    _POSITION,
    _BUCKETS,
    _ONES,
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
    """(row of its tile, its number in the tile, the first of its elements in the tile, how many the tile has)."""
    row = tiles + tl.load(tile_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    block, size = tl.program_id(0) - tl.load(row + _PROGRAM).to(tl.int32), tl.load(row + _SIZE).to(tl.int32)
    if ALIGNED:  # so that a thread has the elements of a row
        size = tl.multiple_of(size, ALIGNMENT)
    return row, block, block * BLOCK, size


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
    if ALIGNED == 1:
        base = tl.multiple_of(base, ALIGNMENT)
    if ALIGNED == 2:  # a row for each line of elements
        base = tl.multiple_of(base, (ALIGNMENT, ALIGNMENT))
    return tl.load(base + within, mask=inside, other=0)


@triton.jit
def _key(row, within, inside, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The key of each element."""
    top: tl.constexpr = 8 * SIZE - 16 if SIZE > 2 else 0
    keys: tl.constexpr = 0x7FFF if SIZE > 1 else 0x7F
    return (_element(row, within, inside, SIZE, ALIGNED) >> top).to(tl.int32) & keys


@triton.jit
def _group(
    row, within, inside, shift, SIZE: tl.constexpr, LINES: tl.constexpr, ONES: tl.constexpr, ALIGNED: tl.constexpr
):
    """The group of each element, 255 where there is none; `shift` is that of `Buckets`."""
    key = _key(row, within, inside, SIZE, ALIGNED)
    bucket = tl.load(tl.load(row + _BUCKETS).to(INT32) + (key >> shift), mask=inside, other=-1)
    group = (bucket if ONES else tl.where(key < (bucket >> 16), bucket, bucket >> 8)) & 0xFF
    if LINES:
        columns = tl.load(row + _COLUMNS).to(tl.int32)
        line = tl.load(row + _ROW) + within // columns
        of_row = _field(row, _ROW_FIELDS, _ROW_WIDTH, line, inside)
        of_column = _field(row, _COLUMN_FIELDS, _COLUMN_WIDTH, within % columns, inside)
        cell = of_row * tl.load(row + _COLUMN_CLASSES).to(tl.int32) + of_column
        cell = cell * tl.load(row + _CLASS_COUNT).to(tl.int32) + group
        group = tl.load(tl.load(row + _CELLS).to(UINT8) + cell, mask=inside, other=255).to(tl.int32)
    return group


@triton.jit
def _one(
    row,
    within,
    inside,
    shift,
    sixteen,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ONES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A one in the place of each element's group, if that is among so many 16, in 4 bits."""
    if ONES:
        bucket = _key(row, within, inside, SIZE, ALIGNED) >> shift
        ones = tl.load(row + _ONES).to(INT64) + sixteen * (_KEYS >> shift)
        one = tl.load(ones + bucket, mask=inside, other=0)
    else:
        own = _group(row, within, inside, shift, SIZE, LINES, ONES, ALIGNED) - 16 * sixteen
        one = tl.full(own.shape, 1, tl.int64) << (4 * (own & 15)).to(tl.int64)
        one = tl.where((own >= 0) & (own < 16), one, 0)
    return one


@triton.jit
def _pairs(counts, STRIPS: tl.constexpr, OF_STRIP: tl.constexpr):
    """[strips]: the counts of groups 0 and 4, and 2 and 6, in 16 bits, given those of 0, 2, 4 and 6 of parts, in 8."""
    parts = tl.reshape(counts, (STRIPS, OF_STRIP))
    return tl.sum(parts & 0x00FF00FF, 1), tl.sum((parts >> 8) & 0x00FF00FF, 1)


@triton.jit(do_not_specialize=["shift"])
def count_kernel(
    tiles,
    tile_of,
    shift,
    counts,
    parts,
    STRIP: tl.constexpr,
    PART: tl.constexpr,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ONES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts elements: int32, of each tile [groups, strips], and int32 [strips of eight groups, 2, parts].

    The latter are bytes: of groups 0, 2, 4 and 6 of eight, then of 1, 3, 5 and 7.
    """
    row, block, start, size = _block(tiles, tile_of, ALIGNED, BLOCK)
    count, strips = tl.load(row + _GROUPS).to(tl.int32), tl.load(row + _STRIPS).to(tl.int32)
    of_strip: tl.constexpr = STRIP // PART
    part, number = tl.arange(0, BLOCK // PART), tl.arange(0, TOGETHER)[None, :]
    of_part = block * (BLOCK // STRIP) + part // of_strip
    strip = block * (BLOCK // STRIP) + tl.arange(0, BLOCK // STRIP)[:, None]
    for sixteen in range((count + 15) // 16):
        even, odd = tl.full((BLOCK // PART,), 0, tl.int64), tl.full((BLOCK // PART,), 0, tl.int64)
        for each in tl.static_range(PART // ROW):
            within = start + part[:, None] * PART + (each * ROW + tl.arange(0, ROW)[None, :])
            rows = tl.sum(_one(row, within, within < size, shift, sixteen, SIZE, LINES, ONES, ALIGNED), 1)
            even += rows & 0x0F0F0F0F0F0F0F0F
            odd += (rows >> 4) & 0x0F0F0F0F0F0F0F0F
        for half in tl.static_range(2):
            first = 16 * sixteen + TOGETHER * half
            if first < count:
                at = tl.load(row + _PARTS) + (first // TOGETHER) * strips + of_part
                out = parts + at * (2 * of_strip) + part % of_strip
                even_, odd_ = (even >> (32 * half)).to(tl.int32), (odd >> (32 * half)).to(tl.int32)
                tl.store(out, even_, mask=of_part < strips)
                tl.store(out + of_strip, odd_, mask=of_part < strips)
                zero, two = _pairs(even_, BLOCK // STRIP, of_strip)
                one, three = _pairs(odd_, BLOCK // STRIP, of_strip)
                low = tl.where(number % 2 == 0, zero[:, None], one[:, None])
                high = tl.where(number % 2 == 0, two[:, None], three[:, None])
                sums = tl.where(number % 4 < 2, low, high) >> (16 * (number // 4))
                at = tl.load(row + _COUNTS) + (first + number) * strips + strip
                tl.store(counts + at, sums & 0xFFFF, mask=(first + number < count) & (strip < strips))


@triton.jit
def _strip_of(ends, first, strips, rank, inside, most):
    """(the strip of a group that has an element, what strips before it have), given the element's number in the group.

    `ends` are sums of counts up to each one, and `first` is the number of the group's first; what is before it counts
    for nothing.  `most` is a power of two, more than half of all strips.
    """
    start = tl.load(ends + first - 1, mask=inside & (first > 0), other=0)
    found, before = rank * 0, rank * 0
    step = most
    while step > 0:
        further = found + step
        # Sums of more than 31 bits wrap, and differences of those of a tile do not.
        end = tl.load(ends + first + further - 1, mask=inside & (further < strips), other=0) - start
        behind = (further < strips) & (end <= rank)
        found, before = tl.where(behind, further, found), tl.where(behind, end, before)
        step = step // 2
    return found, before


@triton.jit(do_not_specialize=["shift", "count", "most"])
def select_kernel(
    tiles,
    tile_of_cell,
    shift,
    cells,
    ranks,
    count,
    ends,
    most,
    parts,
    found,
    values,
    VALUES: tl.constexpr,
    STRIP: tl.constexpr,
    PART: tl.constexpr,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ONES: tl.constexpr,
    ALIGNED: tl.constexpr,
    OF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the places of elements that are given by their cells and their numbers in these.

    A search among the ends of the group's counts tells the strip, the counts of its parts tell the part, and that is
    looked through.  Sets the bit of each element in int32 [programs of blocks, OF_BLOCK / 32]; with VALUES, brings
    the value of each there instead, in [elements].
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = lane < count
    cell = tl.load(cells + lane, mask=given, other=0)
    rank = tl.load(ranks + lane, mask=given, other=0)
    row = tiles + tl.load(tile_of_cell + cell).to(tl.int64) * _WIDTH
    group = cell - tl.load(row + _CELL).to(tl.int32)
    strips = tl.load(row + _STRIPS).to(tl.int32)
    strip, before = _strip_of(ends, tl.load(row + _COUNTS) + group * strips, strips, rank, given, most)
    rank = (rank - before)[:, None]
    at = tl.load(row + _PARTS) + (group // TOGETHER) * strips + strip
    of_strip: tl.constexpr = STRIP // PART
    of_part = parts + (2 * at + group % 2)[:, None] * of_strip + tl.arange(0, of_strip)[None, :]
    counts = (tl.load(of_part, mask=given[:, None], other=0) >> (8 * (group % TOGETHER // 2))[:, None]) & 0xFF
    sums = tl.cumsum(counts, 1)
    part = tl.sum((sums <= rank).to(tl.int32), 1)
    rank -= tl.sum(tl.where(sums <= rank, counts, 0), 1)[:, None]
    start = strip * STRIP + part * PART
    within = start[:, None] + tl.arange(0, PART)[None, :]
    inside = given[:, None] & (within < tl.load(row + _SIZE).to(tl.int32)[:, None])
    own = _group(row[:, None], within, inside, shift, SIZE, LINES, ONES, ALIGNED) == group[:, None]
    place = tl.sum((tl.cumsum(own.to(tl.int32), 1) <= rank).to(tl.int32), 1)
    there = given & (place < PART)
    place += start
    if VALUES:
        value = tl.load(values + lane, mask=there, other=0)
        tl.store(found + tl.load(row + _START) + place, value, mask=there)
    else:
        word = tl.load(row + _PROGRAM) * (OF_BLOCK // 32) + (place >> 5)
        tl.atomic_or(found + word, tl.full(place.shape, 1, tl.int32) << (place & 31), mask=there)


@triton.jit(do_not_specialize=["shift"])
def turn_kernel(
    tiles,
    tile_of,
    shift,
    found,
    counts,
    TURNED: tl.constexpr,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    ONES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns the bits of elements in turned groups, in uint8 [programs, rows], and counts what is set, in int32."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK // ROW) + tl.arange(0, BLOCK // ROW)
    bits = tl.load(found + at).to(tl.int32)
    if TURNED:
        row, _, start, size = _block(tiles, tile_of, ALIGNED, BLOCK)
        within = start + tl.arange(0, BLOCK // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
        inside = within < size
        group = _group(row, within, inside, shift, SIZE, LINES, ONES, ALIGNED)
        turned = tl.load(tl.load(row + _TURNED).to(UINT8) + group, mask=inside, other=0).to(tl.int32)
        # No two lanes of a row have the same bit, so that their sum puts them together.
        bits ^= tl.sum(turned << (within & (ROW - 1)), 1)
        tl.store(found + at, bits.to(tl.uint8))
    tl.store(counts + tl.program_id(0), tl.sum(_bit_count(bits), 0))


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
