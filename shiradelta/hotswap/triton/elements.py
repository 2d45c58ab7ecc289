"""What kernels do to elements: values of codecs, sums that are rounded once, and shifts, in integer arithmetic on bits.

Fused multiply-adds, which round differently, are switched off (`enable_fp_fusion=False`).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.format.registry import Order, ValueId
from shiradelta.hotswap.triton.positions import INT8, INT16, INT32, INT64, PARAMETERS, UINT8, VALUES

# The value codecs that `value_of` decodes, and BITS: a line here and a branch there for each.
F32 = tl.constexpr(int(ValueId.F32))
F16 = tl.constexpr(int(ValueId.F16))
BF16 = tl.constexpr(int(ValueId.BF16))
I8 = tl.constexpr(int(ValueId.I8))
I4 = tl.constexpr(int(ValueId.I4))
SIGN = tl.constexpr(int(ValueId.SIGN))
BITS = tl.constexpr(int(ValueId.BITS))
#: Their ids.
CODECS = frozenset(id for id in ValueId if id.name in globals())
#: Orders of elements, which `shifted` moves in; NO_ORDER is that of operations that do not shift.
SIGN_AND_MAGNITUDE = tl.constexpr(int(Order.SIGN_AND_MAGNITUDE))
UNSIGNED = tl.constexpr(int(Order.UNSIGNED))
NO_ORDER = tl.constexpr(-1)


@triton.jit
def float_of(bits):
    """bf16 bits in an int16 -> float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def pointer(address, SIZE: tl.constexpr):
    """Pointer to elements of SIZE bytes, as integers."""
    if SIZE == 1:
        found = address.to(INT8)
    elif SIZE == 2:
        found = address.to(INT16)
    elif SIZE == 4:
        found = address.to(INT32)
    else:
        tl.static_assert(SIZE == 8, "no kernel moves elements of this size")
        found = address.to(INT64)
    return found


@triton.jit
def _signed(magnitude, minus):
    """Sets the sign bit if `minus`; subtraction would lose the sign of zero."""
    return (magnitude.to(tl.int32, bitcast=True) ^ (minus << 31)).to(tl.float32, bitcast=True)


@triton.jit
def value_of(row, index, active, CODEC: tl.constexpr):
    """float32 of ranks (FORMAT.md, section 5)."""
    values = tl.load(row + VALUES)
    parameters = tl.load(row + PARAMETERS).to(INT16)
    group = index >> 7
    if CODEC == F32:
        value = tl.load(values.to(INT32) + index, mask=active, other=0).to(tl.float32, bitcast=True)
    elif CODEC == F16:
        half = tl.load(values.to(INT16) + index, mask=active, other=0)
        value = half.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODEC == BF16:
        value = float_of(tl.load(values.to(INT16) + index, mask=active, other=0))
    elif CODEC == I8:
        scale = float_of(tl.load(parameters + group, mask=active, other=0))
        value = scale * tl.load(values.to(INT8) + index, mask=active, other=0).to(tl.float32)
    elif CODEC == I4:
        byte = tl.load(values.to(UINT8) + (index >> 1), mask=active, other=0).to(tl.int32)
        nibble = (byte >> ((index & 1) * 4).to(tl.int32)) & 15
        lo = float_of(tl.load(parameters + 2 * group, mask=active, other=0))
        step = float_of(tl.load(parameters + 2 * group + 1, mask=active, other=0))
        value = _signed(lo + step * (nibble & 7).to(tl.float32), nibble >> 3)
    else:
        tl.static_assert(CODEC == SIGN, "no kernel decodes this value codec")
        byte = tl.load(values.to(UINT8) + (index >> 3), mask=active, other=0).to(tl.int32)
        magnitude = float_of(tl.load(parameters + group, mask=active, other=0))
        value = _signed(magnitude, (byte >> (index & 7).to(tl.int32)) & 1)
    return value


@triton.jit
def summed(old, contribution, DTYPE: tl.constexpr):
    """Bits of round(fl32(W + s)); NaN stays (FORMAT.md, 6.1)."""
    if DTYPE == "bfloat16":
        weight = float_of(old)
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
def shifted(old, by, ORDER: tl.constexpr, SIZE: tl.constexpr):
    """(bits of elements that are moved in their order, whether one leaves the range); FORMAT.md, 6.1, ULP."""
    unused: tl.constexpr = 64 - 8 * SIZE
    start = _turned(old.to(tl.int64) << unused, ORDER, SIZE)
    by = by.to(tl.int64) << unused
    end = start + by
    return (_turned(end, ORDER, SIZE) >> unused).to(old.dtype), ((start ^ end) & (by ^ end)) < 0
