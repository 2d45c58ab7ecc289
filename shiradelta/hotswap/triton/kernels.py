"""The kernels: one program per block of RICE, all tensors in one launch, sections as stored in the file.

A program reads its entry (row, block) in `work`, which gives its patch's row in a table of pointers.  It turns the
block's 2,048 unary bits into positions with two prefix sums (spec/FORMAT.md, 4.2), one lane per bit, and works on the
elements there.  Positions and ranks are masked against the tensor, so out-of-range positions of a damaged section are
ignored.  Rounding is integer arithmetic on bits; fused multiply-adds, which round differently, are switched off
(`enable_fp_fusion=False`).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.format.registry import Order, ValueId

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
_INT16 = tl.constexpr(tl.pointer_type(tl.int16))
_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
_INT64 = tl.constexpr(tl.pointer_type(tl.int64))
_UINT8 = tl.constexpr(tl.pointer_type(tl.uint8))
_INT8 = tl.constexpr(tl.pointer_type(tl.int8))

# The value codecs that `_value` and `_put` decode: a line here and a branch there for each.
F32 = tl.constexpr(int(ValueId.F32))
F16 = tl.constexpr(int(ValueId.F16))
BF16 = tl.constexpr(int(ValueId.BF16))
I8 = tl.constexpr(int(ValueId.I8))
I4 = tl.constexpr(int(ValueId.I4))
SIGN = tl.constexpr(int(ValueId.SIGN))
BITS = tl.constexpr(int(ValueId.BITS))
#: Their ids.
CODECS = frozenset(id for id in ValueId if id.name in globals())
#: Orders of elements, which `_shifted` moves in; NO_ORDER is that of operations that do not shift.
SIGN_AND_MAGNITUDE = tl.constexpr(int(Order.SIGN_AND_MAGNITUDE))
UNSIGNED = tl.constexpr(int(Order.UNSIGNED))
NO_ORDER = tl.constexpr(-1)
#: The bits of a word of `overlap_kernel` that hold a rank, and how many they are; above them is a delta's number.
RANK_BITS = tl.constexpr(28)
RANK = tl.constexpr((1 << 28) - 1)
#: The largest number of a delta.
LAST_NUMBER = tl.constexpr(15)
#: Marks an element without a contribution: a NaN pattern that no sum can have.
EMPTY = tl.constexpr(-1)


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
    """An integer that counts elements: 64 bits if BIG, else 32, which is faster."""
    return value.to(tl.int64 if BIG else tl.int32)


@triton.jit
def _targets(row, block, WORD: tl.constexpr, BIG: tl.constexpr):
    """(rank in the tensor, whether its position is inside the tensor, position) of a block's lanes."""
    k = tl.load(row + K).to(tl.int32)
    left = _whole(tl.load(row + UNARY_BITS), BIG) - _whole(block, BIG) * BLOCK
    nnz = _whole(tl.load(row + NNZ), BIG)
    directory = tl.load(row + DIRECTORY)
    base = _whole(_entry(directory, 2 * block, WORD), BIG)
    rank0 = _whole(_entry(directory, 2 * block + 1, WORD), BIG)
    lane = tl.arange(0, BLOCK)
    unary = tl.load(row + UNARY).to(_INT32) + block.to(tl.int64) * (BLOCK // 32)
    word = tl.load(unary + (lane >> 5), mask=lane < left, other=0)
    bit = (word >> (lane & 31)) & 1
    count = tl.cumsum(bit, 0)
    index = rank0 + (count - 1)
    active = (bit == 1) & (index >= 0) & (index < nnz)
    # 32 fields fill k words.  Two words are read, so that a field that crosses from one to the next is whole.
    start = (index & 31).to(tl.int32) * k
    low = tl.load(row + LOW).to(_INT32) + ((index >> 5) * k + (start >> 5))
    first = tl.load(low, mask=active, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(low + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
    shift = (start & 31).to(tl.uint32)
    field = (first >> shift) | ((second << 1) << (31 - shift))
    field = (field & ((1 << k.to(tl.uint32)) - 1)).to(tl.int32, bitcast=True)
    field = _whole(tl.where(active, field, 0), BIG)
    zeros = _whole(lane + 1 - count, BIG)
    position = base + (zeros << k) + tl.cumsum(field, 0) + (count - 1)
    return index, active & (position >= 0) & (position < _whole(tl.load(row + NUMEL), BIG)), position


@triton.jit
def _blocks(row, BIG: tl.constexpr):
    """How many blocks the index has."""
    return _whole((tl.load(row + UNARY_BITS) + (BLOCK - 1)) // BLOCK, BIG)


@triton.jit
def _base(row, block, blocks, WORD: tl.constexpr, BIG: tl.constexpr):
    """Where a block's positions begin; behind the last block, the number of elements."""
    last = block >= blocks
    base = _whole(_entry(tl.load(row + DIRECTORY), tl.where(last, 0, 2 * block), WORD), BIG)
    return tl.where(last, _whole(tl.load(row + NUMEL), BIG), base)


@triton.jit
def _block_at(row, position, blocks, WORD: tl.constexpr, BIG: tl.constexpr):
    """The last block that begins at a position or before it, or a block before that.

    Two loads of 2,048 block starts; a binary search would need eleven dependent loads.
    """
    lane = _whole(tl.arange(0, BLOCK), BIG)
    step = (blocks + (BLOCK - 1)) // BLOCK
    first = (tl.sum((_base(row, lane * step, blocks, WORD, BIG) <= position).to(tl.int32), 0) - 1) * step
    within = (_base(row, first + lane, blocks, WORD, BIG) <= position) & (lane < step)
    return first + tl.sum(within.to(tl.int32), 0) - 1


@triton.jit
def _signed(magnitude, minus):
    """Sets the sign bit if `minus`; subtraction would lose the sign of zero."""
    return (magnitude.to(tl.int32, bitcast=True) ^ (minus << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _value(row, index, active, CODEC: tl.constexpr):
    """float32 of ranks (FORMAT.md, section 5)."""
    values = tl.load(row + VALUES)
    parameters = tl.load(row + PARAMETERS).to(_INT16)
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
    else:
        tl.static_assert(CODEC == SIGN, "no kernel decodes this value codec")
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
        tl.static_assert(DTYPE == "float32", "no kernel adds to this dtype")
        weight = old.to(tl.float32, bitcast=True)
        total = weight + contribution
        new = total.to(tl.int32, bitcast=True)
        quiet = 0x7FC00000
    new = tl.where(total == total, new, quiet)
    return tl.where(weight == weight, new, old).to(old.dtype)


@triton.jit
def _turned(whole, ORDER: tl.constexpr, SIZE: tl.constexpr):
    """Elements in the highest bits of int64 <-> integers that grow with them."""
    if ORDER == SIGN_AND_MAGNITUDE:
        magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF >> (64 - 8 * SIZE) << (64 - 8 * SIZE)
        whole = whole ^ ((whole >> 63) & magnitude)
    elif ORDER == UNSIGNED:
        whole = whole ^ (-1 << 63)
    return whole


@triton.jit
def _shifted(old, by, ORDER: tl.constexpr, SIZE: tl.constexpr):
    """(bits of elements that are moved in their order, whether one leaves the range); FORMAT.md, 6.1, ULP."""
    unused: tl.constexpr = 64 - 8 * SIZE
    start = _turned(old.to(tl.int64) << unused, ORDER, SIZE)
    by = by.to(tl.int64) << unused
    end = start + by
    return (_turned(end, ORDER, SIZE) >> unused).to(old.dtype), ((start ^ end) & (by ^ end)) < 0


@triton.jit
def _pointer(address, SIZE: tl.constexpr):
    """Pointer to elements of SIZE bytes, as integers."""
    if SIZE == 1:
        pointer = address.to(_INT8)
    elif SIZE == 2:
        pointer = address.to(_INT16)
    elif SIZE == 4:
        pointer = address.to(_INT32)
    else:
        tl.static_assert(SIZE == 8, "no kernel moves elements of this size")
        pointer = address.to(_INT64)
    return pointer


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
    weight = _pointer(tl.load(row + WEIGHT), SIZE) + position
    saved = _pointer(room + tl.load(row + ROOM), SIZE) + index
    if FILLED:
        old = tl.load(saved, mask=active, other=0)
    else:
        old = tl.load(weight, mask=active, other=0)
        tl.store(saved, old, mask=active)
    if CODEC == BITS:
        new = tl.load(_pointer(tl.load(row + VALUES), SIZE) + index, mask=active, other=0)
        if ORDER != NO_ORDER:
            new, leaves = _shifted(old, new, ORDER, SIZE)
            tl.store(refused + (index - index), 1, mask=active & leaves)
    else:
        new = _sum(old, strength * _value(row, index, active, CODEC), DTYPE)
    tl.store(weight, new, mask=active)


@triton.jit
def _put_back(row, index, active, position, room, SIZE: tl.constexpr):
    """Writes the saved elements."""
    saved = tl.load(_pointer(room + tl.load(row + ROOM), SIZE) + index, mask=active, other=0)
    tl.store(_pointer(tl.load(row + WEIGHT), SIZE) + position, saved, mask=active)


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
    index, active, position = _targets(row, tl.load(entry + 1), WORD, BIG)
    _put(row, index, active, position, room, strength, refused, CODEC, DTYPE, SIZE, ORDER, FILLED)


@triton.jit
def restore_kernel(table, work, room, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Restores the base's elements of a delta."""
    entry = work + 2 * tl.program_id(0)
    row = table + tl.load(entry) * WIDTH
    index, active, position = _targets(row, tl.load(entry + 1), WORD, BIG)
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
    own = _pointer(sums.to(tl.int64), 4) + tl.program_id(0).to(tl.int64) * REGION
    number = tl.program_id(0)
    while number < count:
        first = tl.load(work + 3 * number)
        rows = tl.load(work + 3 * number + 1)
        start = _whole(tl.load(work + 3 * number + 2), BIG) * REGION
        for turn in range(2 * rows):
            row = table + (first + turn % rows) * WIDTH
            room, strength = _layer(layers, row)
            stop = start + tl.minimum(_whole(tl.load(row + NUMEL), BIG) - start, REGION)
            blocks = _blocks(row, BIG)
            block = _block_at(row, start, blocks, WORD, BIG)
            while _base(row, block, blocks, WORD, BIG) < stop:
                index, active, position = _targets(row, block, WORD, BIG)
                active = active & (position >= start) & (position < stop)
                weight = _pointer(tl.load(row + WEIGHT), SIZE) + position
                saved = _pointer(room + tl.load(row + ROOM), SIZE) + index
                sum_at = own + (position - start)
                sum_bits = tl.load(sum_at, mask=active, other=0)
                sum = sum_bits.to(tl.float32, bitcast=True)
                if turn < rows:
                    if not FILLED:
                        tl.store(saved, tl.load(weight, mask=active, other=0), mask=active)
                    value = strength * _value(row, index, active, CODEC)
                    # The sum starts from the first contribution, not from +0, which would lose the sign of -0.
                    value = tl.where(sum_bits == EMPTY, value, sum + value)
                    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
                    tl.store(sum_at, bits, mask=active)
                else:
                    # Where deltas overlap, the first one here finds the sum and writes it.
                    active = active & (sum_bits != EMPTY)
                    old = tl.load(saved, mask=active, other=0)
                    tl.store(weight, _sum(old, sum, DTYPE), mask=active)
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
    old = tl.load(_pointer(room + tl.load(row + ROOM), SIZE) + rank, mask=active, other=0)
    sum = strength * _value(row, rank, active, CODEC)
    for number in range(2, tl.load(entry + 3) + 1):
        row, rank = _sharer(first, at + number * size, active)
        room, strength = _layer(layers, row)
        if not FILLED:
            tl.store(_pointer(room + tl.load(row + ROOM), SIZE) + rank, old, mask=active)
        sum += strength * _value(row, rank, active, CODEC)
    tl.store(_pointer(tl.load(first + WEIGHT), SIZE) + position, _sum(old, sum, DTYPE), mask=active)


@triton.jit
def fingerprint_kernel(table, work, sums, SIZE: tl.constexpr, WORD: tl.constexpr, BIG: tl.constexpr):
    """Adds mix(position, bits) of a block's elements to the sum of their row (FORMAT.md, 6.3)."""
    entry = work + 2 * tl.program_id(0)
    number = tl.load(entry)
    row = table + number * WIDTH
    index, active, position = _targets(row, tl.load(entry + 1), WORD, BIG)
    element = tl.load(_pointer(tl.load(row + WEIGHT), SIZE) + position, mask=active, other=0).to(tl.int64)
    if SIZE < 8:
        element = element & ((1 << (8 * SIZE)) - 1)
    x = position.to(tl.uint64) * 0x9E3779B97F4A7C15 + (element + 1).to(tl.uint64) * 0xD1B54A32D192ED03
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93
    x = x ^ (x >> 32)
    total = tl.sum(tl.where(active, x.to(tl.int64, bitcast=True), 0), 0)
    tl.atomic_add(sums + number, total)
