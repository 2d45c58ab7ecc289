"""Values of dtypes that nothing is added to, but whose changes can be ranked: float8 and float64.

A float8 element is a weight divided by its tensor's scale.  Elements of two checkpoints are compared only where their
scales are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from shiradelta.format.arithmetic import Array, Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint, same_bits
from shiradelta.models.quantised import scale_of, weight_of
from shiradelta.select.topk import Rows, row_shape

from .item import Skipped, SkipReason

#: The usual size of a block that shares a scale.
_BLOCK = 128


def _fp8_e4m3fn(bits: Array) -> Float32:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F is NaN, there is no infinity."""
    exponent, mantissa = (bits >> 3) & 0xF, (bits & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    magnitude = np.where(exponent > 0, normal, np.ldexp(mantissa, -9)).astype(np.float32)
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude)


#: Dtypes that nothing is added to, but whose changes can be ranked -> their values, rounded to float32.
WIDEN: dict[str, Callable[[Array], Float32]] = {
    "float8_e4m3fn": _fp8_e4m3fn,
    "float8_e5m2": lambda bits: (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32),
    "float64": lambda bits: bits.view(np.float64).astype(np.float32),
}
#: Dtypes whose values can be subtracted.
RANKED = {*ADD_DTYPES, *WIDEN}


def values_of(bits: Array, dtype: str) -> Float32:
    """Elements as float32, rounded where they are wider."""
    widen = WIDEN.get(dtype)
    return to_float32(bits, dtype) if widen is None else widen(bits)


#: Dtypes of scales -> their values: those above, and powers of two.
_SCALES: dict[str, Callable[[Array], Float32]] = {
    **{dtype: partial(values_of, dtype=dtype) for dtype in RANKED},
    "float8_e8m0fnu": lambda bits: np.where(
        bits == 0xFF, np.float32(np.nan), np.ldexp(np.float32(1), bits.astype(np.int32) - 127)
    ),
}


def other_scale(source: Checkpoint, key: str, base: Checkpoint, name: str) -> Skipped | None:
    """Why a tensor's elements, or a scale, cannot be compared with the base's; None if they can.

    Args:
        source: the fine-tune.
        key: a tensor of it, of the base's shape.
        base: the base.
        name: the same tensor of the base.
    """
    is_scale = weight_of(key, source) is not None
    one, other = (key, name) if is_scale else (scale_of(key, source), scale_of(name, base))
    if one is None and other is None:
        return None
    if one is None or other is None:
        has = "the fine-tune" if other is None else "the base"
        why = f"{has} has it divided by {one or other!r}, the other has no scale; store both alike"
        return Skipped(SkipReason.CONFLICT, why, names=(name,))
    if not same_bits(source, one, base, other):
        remedy = "so equal elements are other weights; quantise it with the base's scales"
        why = f"{'it is a scale, and' if is_scale else f'its scale {one!r}'} is not the base's, {remedy}"
        return Skipped(SkipReason.CONFLICT, why, names=(name,))
    if not is_scale and base[other].dtype.name not in _SCALES:
        why = f"its scale {other!r} is {base[other].dtype.name}, which is not read"
        return Skipped(SkipReason.PARTS, why, names=(name,))
    if not is_scale and _blocks(base[name].shape, base[other].shape) is None:
        why = f"its scale {other!r} has shape {list(base[other].shape)}, which fits no blocks of it"
        return Skipped(SkipReason.PARTS, why, names=(name,))
    return None


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """The size of the block that shares a scale, along each dimension; None if scales of that shape fit none.

    A scale may lack its last dimensions.  Blocks have 128 elements, the last of them fewer, or divide a dimension.
    """
    if math.prod(scales) == 1:
        return shape
    full = scales + (1,) * (len(shape) - len(scales))
    if len(full) != len(shape):
        return None
    blocks = []
    for size, count in zip(shape, full, strict=True):
        if count > 1 and count == -(-size // _BLOCK):
            blocks.append(_BLOCK)
        elif count and size % count == 0:
            blocks.append(size // count)
        else:
            return None
    return tuple(blocks)


def scaled(dense: Callable[[], Rows], base: Checkpoint, name: str) -> Callable[[], Rows]:
    """The change of weights, given the change of their elements in the base."""
    scale = scale_of(name, base)
    if scale is None:
        return dense
    shape, blocks = base[name].shape, _blocks(base[name].shape, base[scale].shape)
    assert blocks is not None

    def opened() -> Rows:
        rows, columns = dense(), row_shape(shape)[1]
        counts = [-(-size // block) for size, block in zip(shape, blocks, strict=True)]
        scales = _SCALES[base[scale].dtype.name](base.bits(scale)).reshape(counts)

        def factors(start: int, stop: int) -> Float32:
            """Of some rows, or one for all of them."""
            if scales.size == 1:
                return scales.reshape(1, 1)
            if len(shape) == 2 and columns == shape[1]:
                found: Float32 = scales[np.arange(start, stop) // blocks[0]][:, np.arange(columns) // blocks[1]]
                return found
            at = np.unravel_index(np.arange(start * columns, stop * columns), shape)
            found = scales[tuple(index // block for index, block in zip(at, blocks, strict=True))]
            return found.reshape(-1, columns)

        def made(start: int, stop: int) -> Float32:
            result: Float32 = rows(start, stop).reshape(-1, columns) * factors(start, stop)
            return result

        return made

    return opened
