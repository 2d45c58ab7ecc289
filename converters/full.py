"""A full fine-tune against its base: delta = tuned - base, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from shiradelta.arithmetic import Array, Float32, to_float32
from shiradelta.checkpoint import Checkpoint, Slot, match_names
from shiradelta.delta import TensorDelta, matrix_shape
from shiradelta.select import Rows

from .item import Item, Source, whole_tensor

_ADDED = ("float32", "float16", "bfloat16")


def open_full(source: Checkpoint, base: Checkpoint) -> Source:
    """Every tensor of the fine-tune: changed, added whole, or left alone and why."""
    result = Source()
    found = match_names({name: slot.shape for name, slot in source.items()}, base)
    for key in source:
        if key not in found:
            result.items.append(whole_tensor(source, key, key))
            continue
        item = difference(source, key, base, found[key])
        if isinstance(item, str):
            result.skipped[key] = item
            if "shape" in item:
                result.warnings.append(f"{key} is left out: {item}")
        else:
            result.items.append(item)
    if not found:
        result.items.clear()
        result.skipped = dict.fromkeys(source, f"{base.root} has no such tensor")
    lacking = len(set(base) - set(found.values()))
    if lacking and found:
        result.warnings.append(f"{lacking} tensors of the base are not in the fine-tune; they stay as they are")
    return result


def difference(source: Checkpoint, key: str, base: Checkpoint, name: str) -> Item | str:
    """One tensor's change, or why it cannot be taken."""
    slot, tuned_slot = base[name], source[key]
    if slot.shape != tuned_slot.shape:
        return f"its shape is {list(tuned_slot.shape)}, the base's {list(slot.shape)}"
    base_bits, tuned = partial(base.bits, name), partial(source.bits, key)
    dense = partial(_subtraction, source, key, base, name)
    dtype, tuned_dtype = slot.dtype.name, tuned_slot.dtype.name
    if dtype in _ADDED and tuned_dtype in _ADDED:
        return Item(name, slot.shape, dtype, dense, base_bits=base_bits)
    if dtype != tuned_dtype:
        return f"it is {tuned_dtype}, the base's {dtype}, and nothing can be added to that exactly"
    if dtype in _WIDEN:
        return Item(name, slot.shape, dtype, dense, base_bits=base_bits, replacement=tuned)
    return Item(name, slot.shape, dtype, exact=partial(_all_changes, slot, base_bits, tuned))


def _all_changes(slot: Slot, base_bits: Callable[[], Array], tuned_bits: Callable[[], Array]) -> TensorDelta:
    """Integers and the like have no magnitude to rank by: every change is set."""
    base, tuned = base_bits(), tuned_bits()
    changed = np.flatnonzero(base != tuned)
    return TensorDelta(slot.shape, changed, tuned[changed], slot.dtype.name, "set", base_bits=base[changed])


def _fp8_e4m3fn(bits: Array) -> Float32:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F is NaN, there is no infinity."""
    exponent, mantissa = (bits >> 3) & 0xF, (bits & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    magnitude = np.where(exponent > 0, normal, np.ldexp(mantissa, -9)).astype(np.float32)
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude)


#: Elements to which nothing is added, but which can be ranked: their values, rounded to float32.
_WIDEN: dict[str, Callable[[Array], Float32]] = {
    "float8_e4m3fn": _fp8_e4m3fn,
    "float8_e5m2": lambda bits: (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32),
    "float64": lambda bits: bits.view(np.float64).astype(np.float32),
}


def _values(bits: Array, dtype: str) -> Float32:
    widen = _WIDEN.get(dtype)
    return to_float32(bits, dtype) if widen is None else widen(bits)


def _subtraction(source: Checkpoint, key: str, base: Checkpoint, name: str) -> Rows:
    """tuned - base in float32, a few rows at a time."""
    tuned_bits, base_bits = source.bits(key), base.bits(name)
    tuned_dtype, dtype = source[key].dtype.name, base[name].dtype.name
    columns = matrix_shape(base[name].shape)[1]

    def rows(start: int, stop: int) -> Float32:
        part = slice(start * columns, stop * columns)
        with np.errstate(invalid="ignore", over="ignore"):
            return _values(tuned_bits[part], tuned_dtype) - _values(base_bits[part], dtype)

    return rows
