"""The rows of the kernels' table, and the positions of a block of RICE: one lane for each of its 2,048 unary bits.

Two prefix sums turn the bits into positions (spec/FORMAT.md, 4.2).  Positions and ranks are masked against the tensor,
so out-of-range positions of a damaged section are ignored.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

#: The columns of a row, all int64: addresses of the parts of both sections and of the weight, then numbers.
COLUMNS = (
    "directory",
    "low",
    "unary",
    "values",
    "parameters",
    "weight",
    "k",
    "unary_bits",
    "nnz",
    "numel",
    "room",  # offset of the saved elements in the layer's room, in bytes
    "layer",  # the layer's number, if there are several
)
DIRECTORY, LOW, UNARY, VALUES, PARAMETERS, WEIGHT, K, UNARY_BITS, NNZ, NUMEL, ROOM, LAYER = map(
    tl.constexpr, range(len(COLUMNS))
)
WIDTH = tl.constexpr(len(COLUMNS))
BLOCK = tl.constexpr(2048)
INT16 = tl.constexpr(tl.pointer_type(tl.int16))
INT32 = tl.constexpr(tl.pointer_type(tl.int32))
INT64 = tl.constexpr(tl.pointer_type(tl.int64))
UINT8 = tl.constexpr(tl.pointer_type(tl.uint8))
INT8 = tl.constexpr(tl.pointer_type(tl.int8))


@triton.jit
def _entry(directory, index, WORD: tl.constexpr):
    """A word of the directory."""
    if WORD == 8:
        entry = tl.load(directory.to(INT64) + index)
    else:
        entry = tl.load(directory.to(INT32) + index).to(tl.int64) & 0xFFFFFFFF
    return entry


@triton.jit
def whole(value, BIG: tl.constexpr):
    """An integer that counts elements: 64 bits if BIG, else 32, which is faster."""
    return value.to(tl.int64 if BIG else tl.int32)


@triton.jit
def targets(row, block, WORD: tl.constexpr, BIG: tl.constexpr):
    """(rank in the tensor, whether its position is inside the tensor, position) of a block's lanes."""
    k = tl.load(row + K).to(tl.int32)
    left = whole(tl.load(row + UNARY_BITS), BIG) - whole(block, BIG) * BLOCK
    nnz = whole(tl.load(row + NNZ), BIG)
    directory = tl.load(row + DIRECTORY)
    base = whole(_entry(directory, 2 * block, WORD), BIG)
    rank0 = whole(_entry(directory, 2 * block + 1, WORD), BIG)
    lane = tl.arange(0, BLOCK)
    unary = tl.load(row + UNARY).to(INT32) + block.to(tl.int64) * (BLOCK // 32)
    word = tl.load(unary + (lane >> 5), mask=lane < left, other=0)
    bit = (word >> (lane & 31)) & 1
    count = tl.cumsum(bit, 0)
    index = rank0 + (count - 1)
    active = (bit == 1) & (index >= 0) & (index < nnz)
    # 32 fields fill k words.  Two words are read, so that a field that crosses from one to the next is whole.
    start = (index & 31).to(tl.int32) * k
    low = tl.load(row + LOW).to(INT32) + ((index >> 5) * k + (start >> 5))
    first = tl.load(low, mask=active, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(low + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
    shift = (start & 31).to(tl.uint32)
    field = (first >> shift) | ((second << 1) << (31 - shift))
    field = (field & ((1 << k.to(tl.uint32)) - 1)).to(tl.int32, bitcast=True)
    field = whole(tl.where(active, field, 0), BIG)
    zeros = whole(lane + 1 - count, BIG)
    position = base + (zeros << k) + tl.cumsum(field, 0) + (count - 1)
    return index, active & (position >= 0) & (position < whole(tl.load(row + NUMEL), BIG)), position


@triton.jit
def block_count(row, BIG: tl.constexpr):
    """How many blocks the index has."""
    return whole((tl.load(row + UNARY_BITS) + (BLOCK - 1)) // BLOCK, BIG)


@triton.jit
def block_start(row, block, blocks, WORD: tl.constexpr, BIG: tl.constexpr):
    """Where a block's positions begin; behind the last block, the number of elements."""
    last = block >= blocks
    base = whole(_entry(tl.load(row + DIRECTORY), tl.where(last, 0, 2 * block), WORD), BIG)
    return tl.where(last, whole(tl.load(row + NUMEL), BIG), base)


@triton.jit
def block_at(row, position, blocks, WORD: tl.constexpr, BIG: tl.constexpr):
    """The last block that begins at a position or before it, or a block before that.

    Two loads of 2,048 block starts; a binary search would need eleven dependent loads.
    """
    lane = whole(tl.arange(0, BLOCK), BIG)
    step = (blocks + (BLOCK - 1)) // BLOCK
    first = (tl.sum((block_start(row, lane * step, blocks, WORD, BIG) <= position).to(tl.int32), 0) - 1) * step
    within = (block_start(row, first + lane, blocks, WORD, BIG) <= position) & (lane < step)
    return first + tl.sum(within.to(tl.int32), 0) - 1
