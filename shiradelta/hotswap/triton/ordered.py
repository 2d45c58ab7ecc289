"""Kernels that find listed elements of the base, given their numbers in their cells (FORMAT.md, 4.7).

One counts the elements of each group in each strip of a tile, and in parts of these.  Another finds the place of an
element by two searches among the counts and a look at one part, so that what takes long is done for listed ones only.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.hotswap.triton.classed import (
    ALL_KEYS,
    AT_CELL,
    AT_COUNTS,
    AT_GROUPS,
    AT_ONES,
    AT_PARTS,
    AT_PROGRAM,
    AT_SIZE,
    AT_START,
    AT_STRIPS,
    ROW,
    TOGETHER,
    WIDTH,
    block_of,
    group_of,
    key_of,
)
from shiradelta.hotswap.triton.positions import INT64


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
        bucket = key_of(row, within, inside, SIZE, ALIGNED) >> shift
        ones = tl.load(row + AT_ONES).to(INT64) + sixteen * (ALL_KEYS >> shift)
        one = tl.load(ones + bucket, mask=inside, other=0)
    else:
        own = group_of(row, within, inside, shift, SIZE, LINES, ONES, ALIGNED) - 16 * sixteen
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
    row, block, start, size = block_of(tiles, tile_of, ALIGNED, BLOCK)
    count, strips = tl.load(row + AT_GROUPS).to(tl.int32), tl.load(row + AT_STRIPS).to(tl.int32)
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
                at = tl.load(row + AT_PARTS) + (first // TOGETHER) * strips + of_part
                out = parts + at * (2 * of_strip) + part % of_strip
                even_, odd_ = (even >> (32 * half)).to(tl.int32), (odd >> (32 * half)).to(tl.int32)
                tl.store(out, even_, mask=of_part < strips)
                tl.store(out + of_strip, odd_, mask=of_part < strips)
                zero, two = _pairs(even_, BLOCK // STRIP, of_strip)
                one, three = _pairs(odd_, BLOCK // STRIP, of_strip)
                low = tl.where(number % 2 == 0, zero[:, None], one[:, None])
                high = tl.where(number % 2 == 0, two[:, None], three[:, None])
                sums = tl.where(number % 4 < 2, low, high) >> (16 * (number // 4))
                at = tl.load(row + AT_COUNTS) + (first + number) * strips + strip
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
    row = tiles + tl.load(tile_of_cell + cell).to(tl.int64) * WIDTH
    group = cell - tl.load(row + AT_CELL).to(tl.int32)
    strips = tl.load(row + AT_STRIPS).to(tl.int32)
    strip, before = _strip_of(ends, tl.load(row + AT_COUNTS) + group * strips, strips, rank, given, most)
    rank = (rank - before)[:, None]
    at = tl.load(row + AT_PARTS) + (group // TOGETHER) * strips + strip
    of_strip: tl.constexpr = STRIP // PART
    of_part = parts + (2 * at + group % 2)[:, None] * of_strip + tl.arange(0, of_strip)[None, :]
    counts = (tl.load(of_part, mask=given[:, None], other=0) >> (8 * (group % TOGETHER // 2))[:, None]) & 0xFF
    sums = tl.cumsum(counts, 1)
    part = tl.sum((sums <= rank).to(tl.int32), 1)
    rank -= tl.sum(tl.where(sums <= rank, counts, 0), 1)[:, None]
    start = strip * STRIP + part * PART
    within = start[:, None] + tl.arange(0, PART)[None, :]
    inside = given[:, None] & (within < tl.load(row + AT_SIZE).to(tl.int32)[:, None])
    own = group_of(row[:, None], within, inside, shift, SIZE, LINES, ONES, ALIGNED) == group[:, None]
    place = tl.sum((tl.cumsum(own.to(tl.int32), 1) <= rank).to(tl.int32), 1)
    there = given & (place < PART)
    place += start
    if VALUES:
        value = tl.load(values + lane, mask=there, other=0)
        tl.store(found + tl.load(row + AT_START) + place, value, mask=there)
    else:
        word = tl.load(row + AT_PROGRAM) * (OF_BLOCK // 32) + (place >> 5)
        tl.atomic_or(found + word, tl.full(place.shape, 1, tl.int32) << (place & 31), mask=there)
