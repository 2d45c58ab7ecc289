"""Kernels that make nonzeros of bits: those of elements that are listed, in blocks (FORMAT.md, 4.7)."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.hotswap.triton.classed import (
    AT_BASE,
    AT_POSITION,
    AT_PROGRAM,
    AT_TURNED,
    ROW,
    WIDTH,
    block_of,
    group_of,
)
from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import UINT8


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
        row, _, start, size = block_of(tiles, tile_of, ALIGNED, BLOCK)
        within = start + tl.arange(0, BLOCK // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
        inside = within < size
        group = group_of(row, within, inside, shift, SIZE, LINES, ONES, ALIGNED)
        turned = tl.load(tl.load(row + AT_TURNED).to(UINT8) + group, mask=inside, other=0).to(tl.int32)
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
    row = tiles + tl.load(tile_of + block, mask=word != 0, other=0).to(tl.int64) * WIDTH
    within = (block - tl.load(row + AT_PROGRAM, mask=word != 0, other=0)) * OF_BLOCK + number % (OF_BLOCK // 32) * 32
    base = tl.load(row + AT_BASE, mask=word != 0, other=0)
    position = tl.load(row + AT_POSITION, mask=word != 0, other=0)
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
