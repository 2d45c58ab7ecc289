"""The arithmetic that the format defines (spec/FORMAT.md, section 6), in NumPy.

This is the reference: every other backend must give these bits.  Elements are handled as their bit
patterns, unsigned integers of the dtype's size, so that NaN payloads and denormals survive.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.format.operations import Operation
from shiradelta.format.registry import ORDERED, Order
from shiradelta.util.arrays import ranges

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

#: The bits of a result that is not a number, by dtype.
QUIET_NAN = {"float32": 0x7FC00000, "bfloat16": 0x7FC0, "float16": 0x7E00}

#: The smallest number that rounds to float32's infinity.
_OVERFLOW = 2.0**128 - 2.0**103


def bfloat16_bits(values: Float32) -> npt.NDArray[np.uint16]:
    """float32 -> bf16 bits, to nearest, ties to even.  NaN becomes the quiet NaN 0x7FC0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Adding half of the last kept digit, less one if that digit is even, makes truncation round to even.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: Array) -> Float32:
    """bf16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float32(bits: Array, dtype: str) -> Float32:
    """Elements' bits -> float32, exact; for float32, float16 and bfloat16 alone."""
    if dtype == "bfloat16":
        return from_bfloat16(bits)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "float32":
        return bits.view(np.float32)
    raise DeltaError(f"{dtype} elements have no exact float32 values; use their bits")


def from_float32(values: Float32, dtype: str) -> Array:
    """float32 -> elements' bits, to nearest, ties to even; overflow to infinity, NaN to the quiet NaN.

    Raises:
        DeltaError: the format defines no rounding to this dtype.
    """
    if dtype not in QUIET_NAN:
        raise DeltaError(f"float32 is not rounded to {dtype} elements; take {', '.join(QUIET_NAN)}")
    if dtype == "bfloat16":
        return bfloat16_bits(values)
    with np.errstate(over="ignore"):
        if dtype == "float16":
            bits: Array = values.astype(np.float16).view(np.uint16)
        else:
            bits = values.view(np.uint32)
    return np.where(np.isnan(values), bits.dtype.type(QUIET_NAN[dtype]), bits)


def alpha_of(strength: float) -> np.float32:
    """alpha = fl32(strength).

    Raises:
        ArgumentError: the strength is not a finite float32.
    """
    try:
        number = float(strength)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < _OVERFLOW:  # false for NaN, too
        raise ArgumentError(f"strength {strength} is not a finite float32; give a finite number")
    return np.float32(number)


def scaled(values: Float32, strength: float) -> Float32:
    """s = fl32(alpha * v)."""
    alpha = alpha_of(strength)
    if alpha == 1:
        return values
    with np.errstate(over="ignore", under="ignore"):
        return values * alpha


def add(bits: Array, dtype: str, contribution: Float32) -> Array:
    """ADD: bits of round(fl32(W + s)); NaN weights stay unchanged (section 6.1)."""
    weight = to_float32(bits, dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = from_float32(weight + contribution, dtype)
    return np.where(np.isnan(weight), bits, result)


def ordered(bits: Array, dtype: str) -> Array:
    """Elements' bits -> signed integers of their size that grow with the element; its own inverse (section 6.1, ULP).

    -0 comes right before +0; infinities and NaN are integers as all others.

    Raises:
        DeltaError: the dtype has no order.
    """
    order = ORDERED.get(dtype)
    if order is None:
        raise DeltaError(f"{dtype} elements have no order to move along; use set")
    whole: Array = bits.view(f"<i{bits.itemsize}")
    limits = np.iinfo(whole.dtype)
    if order is Order.SIGN_AND_MAGNITUDE:
        whole = whole ^ ((whole >> (8 * bits.itemsize - 1)) & limits.max)
    elif order is Order.UNSIGNED:
        whole = whole ^ limits.min
    return whole


def out_of_range(what: str) -> DeltaError:
    """The error of a ULP that moves an element out of the range of its dtype."""
    return DeltaError(f"{what} would leave the range of its dtype; give the base that the delta was made against")


def shift(bits: Array, dtype: str, shifts: Array) -> Array:
    """ULP: the elements' bits after a move by `shifts`, signed integers of their size or the bits of such.

    Raises:
        DeltaError: an element would leave the range of its dtype.
    """
    start, by = ordered(bits, dtype), shifts.view(f"<i{bits.itemsize}")
    with np.errstate(over="ignore"):
        end = start + by
    if np.any(((start ^ end) & (by ^ end)) < 0):
        raise out_of_range("an element")
    return ordered(end.view(bits.dtype), dtype).view(bits.dtype)


def shifts_between(old: Array, new: Array, dtype: str) -> Array | None:
    """The shifts, signed, that make the bits `old` the bits `new`; None where one does not fit the elements' size."""
    by: Array = np.empty(old.shape, f"<i{old.itemsize}")
    least = np.iinfo(by.dtype).min
    for first, last in ranges(old.size):
        start, end = ordered(old[first:last], dtype), ordered(new[first:last], dtype)
        some = by[first:last]
        with np.errstate(over="ignore"):
            np.subtract(end, start, out=some)
        if np.any(((end ^ start) & (end ^ some)) < 0) or np.any(some == least):
            return None
    return by


def result(operation: Operation, payload: Array, old: Array, dtype: str, strength: float) -> Array:
    """The elements' bits after a delta.

    Args:
        operation: what the delta does.
        payload: float32 bits of values for ADD, bits of shifts for ULP, the elements themselves for SET and NEW.
        old: the elements' bits before.
        dtype: their dtype.
        strength: alpha.

    Raises:
        DeltaError: ULP moves an element out of the range of its dtype.
    """
    if operation.adds:
        return add(old, dtype, scaled(payload.view(np.float32), strength))
    return shift(old, dtype, payload) if operation.shifts else payload


def mix(positions: Array, bits: Array) -> Array:
    """The mixed bits of each pair, uint64 (section 6.3)."""
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += (bits.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        x ^= x >> np.uint64(32)
        x *= np.uint64(0xD6E8FEB86659FD93)
        x ^= x >> np.uint64(32)
        return x


def fingerprint(positions: Positions, bits: Array) -> int:
    """Sum of mix(position, bits) modulo 2^64 (section 6.3)."""
    return int(mix(positions, bits).sum(dtype=np.uint64))
