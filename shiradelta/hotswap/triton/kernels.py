"""The kernels: one program per block of RICE, all tensors in one launch, sections as stored in the file.

A program reads its entry (row, block) in `work`, which gives its patch's row in a table of pointers (positions.py), and
works on the elements (elements.py) at the block's positions.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.hotswap.triton.elements import BITS, NO_ORDER, pointer, shifted, summed, value_of
from shiradelta.hotswap.triton.positions import (
    BLOCK,
    LAYER,
    NUMEL,
    ROOM,
    VALUES,
    WEIGHT,
    WIDTH,
    block_at,
    block_count,
    block_start,
    targets,
    whole,
)

#: The bits of a word of `overlap_kernel` that hold a rank, and how many they are; above them is a delta's number.
RANK_BITS = tl.constexpr(28)
RANK = tl.constexpr((1 << 28) - 1)
#: The largest number of a delta.
LAST_NUMBER = tl.constexpr(15)
#: Marks an element without a contribution: a NaN pattern that no sum can have.
EMPTY = tl.constexpr(-1)


@triton.jit
def _put(
    row,
    index,
    active,
    position,
    room,
    strength,
    refused,
    CODEC,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    FILLED,
):
    """Saves the elements at the positions, unless they are in the room already, and writes the new ones."""
    weight = pointer(tl.load(row + WEIGHT), SIZE) + position
    saved = pointer(room + tl.load(row + ROOM), SIZE) + index
    if FILLED:
        old = tl.load(saved, mask=active, other=0)
    else:
        old = tl.load(weight, mask=active, other=0)
        tl.store(saved, old, mask=active)
    if CODEC == BITS:
        new = tl.load(pointer(tl.load(row + VALUES), SIZE) + index, mask=active, other=0)
        if ORDER != NO_ORDER:
            new, leaves = shifted(old, new, ORDER, SIZE)
            tl.store(refused + (index - index), 1, mask=active & leaves)
    else:
        new = summed(old, strength * value_of(row, index, active, CODEC), DTYPE)
    tl.store(weight, new, mask=active)


@triton.jit
def _put_back(row, index, active, position, room, SIZE: tl.constexpr):
    """Writes the saved elements."""
    saved = tl.load(pointer(room + tl.load(row + ROOM), SIZE) + index, mask=active, other=0)
    tl.store(pointer(tl.load(row + WEIGHT), SIZE) + position, saved, mask=active)


@triton.jit
def apply_kernel(
    table,
    work,
    room,
    strength,
    refused,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    BIG: tl.constexpr,
    ORDER: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Applies a delta to the base; if FILLED, replaces the same delta with another strength.

    A shift that leaves the dtype's range sets `refused`, int32; what is written then has to be restored.
    """
    entry = work + 2 * tl.program_id(0)
    row = table + tl.load(entry) * WIDTH
    index, active, position = targets(row, tl.load(entry + 1), WORD, BIG)
    _put(row, index, active, position, room, strength, refused, CODEC, DTYPE, SIZE, ORDER, FILLED)


@triton.jit
def restore_kernel(table, work, room, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Restores the base's elements of a delta."""
    entry = work + 2 * tl.program_id(0)
    row = table + tl.load(entry) * WIDTH
    index, active, position = targets(row, tl.load(entry + 1), WORD, BIG)
    _put_back(row, index, active, position, room, SIZE)


@triton.jit
def _layer(layers, row):
    """(room, strength) of a row's layer, if there are several layers."""
    layer = layers + 2 * tl.load(row + LAYER)
    return tl.load(layer), tl.load(layer + 1).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def stack_kernel(
    table,
    work,
    count,
    layers,
    sums,
    REGION: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    BIG: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Applies the sum of several deltas to the base; if FILLED, replaces the same deltas with other strengths.

    A program goes through regions of REGION elements: entries (first row, rows, region) in `work`.  It adds the
    contributions of one row after another in `sums`, its own float32 [REGION], then rounds each sum once.  Elements
    of `sums` without a contribution hold EMPTY, before and after.  `layers` has (room, bits of the strength) of each.
    """
    own = pointer(sums.to(tl.int64), 4) + tl.program_id(0).to(tl.int64) * REGION
    number = tl.program_id(0)
    while number < count:
        first = tl.load(work + 3 * number)
        rows = tl.load(work + 3 * number + 1)
        start = whole(tl.load(work + 3 * number + 2), BIG) * REGION
        for turn in range(2 * rows):
            row = table + (first + turn % rows) * WIDTH
            room, strength = _layer(layers, row)
            stop = start + tl.minimum(whole(tl.load(row + NUMEL), BIG) - start, REGION)
            blocks = block_count(row, BIG)
            block = block_at(row, start, blocks, WORD, BIG)
            while block_start(row, block, blocks, WORD, BIG) < stop:
                index, active, position = targets(row, block, WORD, BIG)
                active = active & (position >= start) & (position < stop)
                weight = pointer(tl.load(row + WEIGHT), SIZE) + position
                saved = pointer(room + tl.load(row + ROOM), SIZE) + index
                sum_at = own + (position - start)
                sum_bits = tl.load(sum_at, mask=active, other=0)
                sum = sum_bits.to(tl.float32, bitcast=True)
                if turn < rows:
                    if not FILLED:
                        tl.store(saved, tl.load(weight, mask=active, other=0), mask=active)
                    value = strength * value_of(row, index, active, CODEC)
                    # The sum starts from the first contribution, not from +0, which would lose the sign of -0.
                    value = tl.where(sum_bits == EMPTY, value, sum + value)
                    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
                    tl.store(sum_at, bits, mask=active)
                else:
                    # Where deltas overlap, the first one here finds the sum and writes it.
                    active = active & (sum_bits != EMPTY)
                    old = tl.load(saved, mask=active, other=0)
                    tl.store(weight, summed(old, sum, DTYPE), mask=active)
                    tl.store(sum_at, tl.full([BLOCK], EMPTY, tl.int32), mask=active)
                block += 1
            tl.debug_barrier()  # the next row's threads read what these have written
        number += tl.num_programs(0)


@triton.jit
def _sharer(first, at, active):
    """(row, rank) of a delta, from a word of `lists`."""
    word = tl.load(at, mask=active, other=0)
    return first + ((word >> RANK_BITS) & LAST_NUMBER) * WIDTH, word & RANK


@triton.jit
def overlap_kernel(
    table,
    work,
    lists,
    layers,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    BIG: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Corrects the elements that several deltas of a stack share, after each was applied separately, in order.

    An entry is (the stack's first row, start, count, how many share each element, size): `lists` has int32
    [1 + how many, size] there, from element `start` on: positions, then for each delta that shares the element its
    number in the stack and its rank, in one word.  Corrects the elements that all but the first one saved, and rounds
    the sum once.
    """
    entry = work + 5 * tl.program_id(0)
    first = table + tl.load(entry) * WIDTH
    lane = tl.arange(0, BLOCK)
    active = lane < tl.load(entry + 2)
    size = tl.load(entry + 4)
    at = lists + tl.load(entry + 1) + lane
    position = tl.load(at, mask=active, other=0)
    row, rank = _sharer(first, at + size, active)
    room, strength = _layer(layers, row)
    old = tl.load(pointer(room + tl.load(row + ROOM), SIZE) + rank, mask=active, other=0)
    sum = strength * value_of(row, rank, active, CODEC)
    for number in range(2, tl.load(entry + 3) + 1):
        row, rank = _sharer(first, at + number * size, active)
        room, strength = _layer(layers, row)
        if not FILLED:
            tl.store(pointer(room + tl.load(row + ROOM), SIZE) + rank, old, mask=active)
        sum += strength * value_of(row, rank, active, CODEC)
    tl.store(pointer(tl.load(first + WEIGHT), SIZE) + position, summed(old, sum, DTYPE), mask=active)


@triton.jit
def fingerprint_kernel(table, work, sums, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Adds mix(position, bits) of a block's elements to the sum of their row (FORMAT.md, 6.3)."""
    entry = work + 2 * tl.program_id(0)
    number = tl.load(entry)
    row = table + number * WIDTH
    index, active, position = targets(row, tl.load(entry + 1), WORD, BIG)
    element = tl.load(pointer(tl.load(row + WEIGHT), SIZE) + position, mask=active, other=0).to(tl.int64)
    if SIZE < 8:
        element = element & ((1 << (8 * SIZE)) - 1)
    x = position.to(tl.uint64) * 0x9E3779B97F4A7C15 + (element + 1).to(tl.uint64) * 0xD1B54A32D192ED03
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93
    x = x ^ (x >> 32)
    total = tl.sum(tl.where(active, x.to(tl.int64, bitcast=True), 0), 0)
    tl.atomic_add(sums + number, total)
