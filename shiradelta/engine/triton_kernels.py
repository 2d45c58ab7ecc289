"""The kernels: a block of RICE a program, all tensors in one launch, sections as they lie in the file.

A program finds its tensor's row in a table of pointers, turns its 2,048 unary bits into positions with two prefix
sums (spec/FORMAT.md, 4.2), one lane a bit, and works on the elements there.  Positions and ranks are masked against
the tensor, whatever the section says.  Rounding is integer arithmetic on bits; nothing may be contracted to a fused
multiply-add (`enable_fp_fusion=False`).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

#: The columns of a row, all int64.
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
    "saved",
    "strength",  # the bits of a float32
)
WIDTH = tl.constexpr(len(COLUMNS))
BLOCK = tl.constexpr(2048)
_INT16 = tl.constexpr(tl.pointer_type(tl.int16))
_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
_INT64 = tl.constexpr(tl.pointer_type(tl.int64))
_UINT8 = tl.constexpr(tl.pointer_type(tl.uint8))
_INT8 = tl.constexpr(tl.pointer_type(tl.int8))

F32, F16, BF16, I8, I4, SIGN = (tl.constexpr(i) for i in range(1, 7))


@triton.jit
def _float(bits):
    """bf16 bits in an int16 -> float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _entry(directory, index, WORD: tl.constexpr):
    """A word of the directory."""
    if WORD == 8:
        entry = tl.load(directory.to(_INT64) + index)
    else:
        entry = tl.load(directory.to(_INT32) + index).to(tl.int64) & 0xFFFFFFFF
    return entry


@triton.jit
def _whole(value, BIG: tl.constexpr):
    """An integer that counts elements: 64 bits if BIG, and else 32, which are faster."""
    return value.to(tl.int64 if BIG else tl.int32)


@triton.jit
def _decode(row, block, WORD: tl.constexpr, BIG: tl.constexpr):
    """(bit, rank in the tensor, whether there is such a rank, position) of a block's lanes, (base, rank) of the block.

    What lanes without a rank hold is of no use.
    """
    k = tl.load(row + 6).to(tl.int32)
    left = _whole(tl.load(row + 7), BIG) - _whole(block, BIG) * BLOCK
    nnz = _whole(tl.load(row + 8), BIG)
    directory = tl.load(row)
    base = _whole(_entry(directory, 2 * block, WORD), BIG)
    rank0 = _whole(_entry(directory, 2 * block + 1, WORD), BIG)
    lane = tl.arange(0, BLOCK)
    unary = tl.load(row + 2).to(_INT32) + block.to(tl.int64) * (BLOCK // 32)
    word = tl.load(unary + (lane >> 5), mask=lane < left, other=0)
    bit = (word >> (lane & 31)) & 1
    count = tl.cumsum(bit, 0)
    index = rank0 + (count - 1)
    active = (bit == 1) & (index >= 0) & (index < nnz)
    # 32 fields fill k words.  Two words are read, so that a field that crosses from one to the next is whole.
    start = (index & 31).to(tl.int32) * k
    low = tl.load(row + 1).to(_INT32) + ((index >> 5) * k + (start >> 5))
    first = tl.load(low, mask=active, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(low + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
    shift = (start & 31).to(tl.uint32)
    field = (first >> shift) | ((second << 1) << (31 - shift))
    field = (field & ((1 << k.to(tl.uint32)) - 1)).to(tl.int32, bitcast=True)
    field = _whole(tl.where(active, field, 0), BIG)
    zeros = _whole(lane + 1 - count, BIG)
    position = base + (zeros << k) + tl.cumsum(field, 0) + (count - 1)
    return bit, index, active, position, base, rank0


@triton.jit
def _targets(row, block, WORD: tl.constexpr, BIG: tl.constexpr):
    """(rank, whether there is one and its position is inside the tensor, position) of a block's lanes."""
    bit, index, active, position, base, rank0 = _decode(row, block, WORD, BIG)
    return index, active & (position >= 0) & (position < _whole(tl.load(row + 9), BIG)), position


@triton.jit
def _signed(magnitude, minus):
    """Minus sets the sign bit itself: negation by subtraction would lose that of zero."""
    return (magnitude.to(tl.int32, bitcast=True) ^ (minus << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _value(row, index, active, CODEC: tl.constexpr):
    """float32 of ranks (FORMAT.md, section 5)."""
    values = tl.load(row + 3)
    parameters = tl.load(row + 4).to(_INT16)
    group = index >> 7
    if CODEC == F32:
        value = tl.load(values.to(_INT32) + index, mask=active, other=0).to(tl.float32, bitcast=True)
    elif CODEC == F16:
        half = tl.load(values.to(_INT16) + index, mask=active, other=0)
        value = half.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODEC == BF16:
        value = _float(tl.load(values.to(_INT16) + index, mask=active, other=0))
    elif CODEC == I8:
        scale = _float(tl.load(parameters + group, mask=active, other=0))
        value = scale * tl.load(values.to(_INT8) + index, mask=active, other=0).to(tl.float32)
    elif CODEC == I4:
        byte = tl.load(values.to(_UINT8) + (index >> 1), mask=active, other=0).to(tl.int32)
        nibble = (byte >> ((index & 1) * 4).to(tl.int32)) & 15
        lo = _float(tl.load(parameters + 2 * group, mask=active, other=0))
        step = _float(tl.load(parameters + 2 * group + 1, mask=active, other=0))
        value = _signed(lo + step * (nibble & 7).to(tl.float32), nibble >> 3)
    else:  # SIGN
        byte = tl.load(values.to(_UINT8) + (index >> 3), mask=active, other=0).to(tl.int32)
        magnitude = _float(tl.load(parameters + group, mask=active, other=0))
        value = _signed(magnitude, (byte >> (index & 7).to(tl.int32)) & 1)
    return value


@triton.jit
def _sum(old, contribution, DTYPE: tl.constexpr):
    """Bits of round(fl32(W + s)); NaN stays (FORMAT.md, 6.1)."""
    if DTYPE == "bfloat16":
        weight = _float(old)
        total = weight + contribution
        bits = total.to(tl.uint32, bitcast=True)
        new = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        quiet = 0x7FC0
    elif DTYPE == "float16":
        weight = old.to(tl.float16, bitcast=True).to(tl.float32)
        total = weight + contribution
        new = total.to(tl.float16).to(tl.int16, bitcast=True)
        quiet = 0x7E00
    else:
        weight = old.to(tl.float32, bitcast=True)
        total = weight + contribution
        new = total.to(tl.int32, bitcast=True)
        quiet = 0x7FC00000
    new = tl.where(total == total, new, quiet)
    return tl.where(weight == weight, new, old).to(old.dtype)


@triton.jit
def _pointer(address, SIZE: tl.constexpr):
    """To elements of SIZE bytes, as integers."""
    if SIZE == 1:
        pointer = address.to(_INT8)
    elif SIZE == 2:
        pointer = address.to(_INT16)
    elif SIZE == 4:
        pointer = address.to(_INT32)
    else:
        pointer = address.to(_INT64)
    return pointer


@triton.jit
def apply_kernel(
    table,
    owner,
    first,
    CODEC: tl.constexpr,  # BITS (7) sets
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    BIG: tl.constexpr,
):
    """Saves the elements at the positions and writes the new ones."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    row = table + tensor * WIDTH
    index, active, position = _targets(row, program - tl.load(first + tensor), WORD, BIG)
    weight = _pointer(tl.load(row + 5), SIZE) + position
    old = tl.load(weight, mask=active, other=0)
    tl.store(_pointer(tl.load(row + 10), SIZE) + index, old, mask=active)
    if CODEC == 7:
        new = tl.load(_pointer(tl.load(row + 3), SIZE) + index, mask=active, other=0)
    else:
        strength = tl.load(row + 11).to(tl.int32).to(tl.float32, bitcast=True)
        new = _sum(old, strength * _value(row, index, active, CODEC), DTYPE)
    tl.store(weight, new, mask=active)


@triton.jit
def restore_kernel(table, owner, first, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Puts the saved elements back."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    row = table + tensor * WIDTH
    index, active, position = _targets(row, program - tl.load(first + tensor), WORD, BIG)
    saved = tl.load(_pointer(tl.load(row + 10), SIZE) + index, mask=active, other=0)
    tl.store(_pointer(tl.load(row + 5), SIZE) + position, saved, mask=active)


@triton.jit
def check_kernel(table, owner, first, wrong, WORD: tl.constexpr):
    """Counts, in `wrong`, the blocks of a tensor that contradict the next one's entry or leave the tensor."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    row = table + tensor * WIDTH
    block = program - tl.load(first + tensor)
    unary_bits = tl.load(row + 7)
    nnz = tl.load(row + 8)
    numel = tl.load(row + 9)
    bit, index, active, position, base, rank0 = _decode(row, block, WORD, True)
    ones = tl.sum(bit, 0)
    largest = tl.max(tl.where(active, position, -1), 0)
    good = (base >= 0) & (base <= numel) & (rank0 >= 0) & (rank0 <= nnz) & (largest < numel)
    good = good & ((block > 0) | ((base == 0) & (rank0 == 0)))
    lane = tl.arange(0, BLOCK)
    left = unary_bits - block.to(tl.int64) * BLOCK
    if left > BLOCK:
        directory = tl.load(row)
        end = tl.sum(tl.where(lane == BLOCK - 1, position + 1, 0), 0)
        good = good & (_entry(directory, 2 * block + 2, WORD) == end)
        good = good & (_entry(directory, 2 * block + 3, WORD) == rank0 + ones)
    else:
        good = good & (tl.sum(tl.where(lane == left - 1, bit, 0), 0) == 1) & (rank0 + ones == nnz)
    tl.atomic_add(wrong + tensor, tl.where(good, 0, 1))


@triton.jit
def fingerprint_kernel(table, owner, first, sums, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Adds mix(position, bits) of the elements there to the tensor's sum (FORMAT.md, 6.3)."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    row = table + tensor * WIDTH
    index, active, position = _targets(row, program - tl.load(first + tensor), WORD, BIG)
    element = tl.load(_pointer(tl.load(row + 5), SIZE) + position, mask=active, other=0).to(tl.int64)
    if SIZE < 8:
        element = element & ((1 << (8 * SIZE)) - 1)
    x = position.to(tl.uint64) * 0x9E3779B97F4A7C15 + (element + 1).to(tl.uint64) * 0xD1B54A32D192ED03
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93
    x = x ^ (x >> 32)
    total = tl.sum(tl.where(active, x.to(tl.int64, bitcast=True), 0), 0)
    tl.atomic_add(sums + tensor, total)
