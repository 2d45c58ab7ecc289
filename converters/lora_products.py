"""The changes of single LoRA modules: their alphas, factors and shapes, and B A or similar, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from . import lycoris
from .item import Skipped, SkipReason
from .lora_converted import Change
from .lora_keys import Module
from .lora_parameters import stacked_rows
from .lora_scale import Scale, number


def product_of(source: Checkpoint, parts: Module, shape: tuple[int, ...], factor: float, swap: bool) -> Change:
    """The change of a module by itself: in the factors' own order of dimensions, or transposed."""
    shape = shape[::-1] if swap else shape
    return Change(partial(_dense(parts), source, parts, factor, swap, shape), shape)


def _dense(parts: Module) -> Callable[[Checkpoint, Module, float, bool, tuple[int, ...]], Rows]:
    """The function that opens the change of a module."""
    if parts.stack is not None:
        return _stacked
    if parts.bias_of is not None:
        return _bias
    return _lycoris if lycoris.is_lycoris(parts.keys) else _product


def alpha_in(source: Checkpoint, key: str) -> float:
    """The number in a module's alpha tensor, of any dtype."""
    slot, bits = source[key], source.bits(key)
    if not bits.size:
        raise SourceError(f"{source.root}: {key!r} is empty; get the file again")
    if slot.dtype.name in ADD_DTYPES:
        value = to_float32(bits, slot.dtype.name)[0]
    elif slot.dtype.name == "float64" or "int" in slot.dtype.name:
        value = bits.view(slot.dtype.name)[0]
    else:
        raise SourceError(f"{source.root}: {key!r} is {slot.dtype.name}, which is not a number; give --alpha")
    return number(value.item(), f"{source.root}: {key!r}")


def factor_of(source: Checkpoint, module: str, parts: Module, scale: Scale, alpha: float | None) -> float:
    """The factor on the product of a module's factors."""
    if "E" in parts.keys:
        factor = scale.adaptive(module)
    else:
        rank = rank_of(source, module, parts, scale)
        factor = 1.0 if rank is None else scale(module, rank, alpha)
    if abs(factor) > float(np.finfo(np.float32).max):
        raise SourceError(f"{module}: a scale of {factor:g} is beyond float32; give --alpha")
    return factor


def rank_of(source: Checkpoint, module: str, parts: Module, scale: Scale) -> int | None:
    """What a module's alpha is divided by; None for a LoKr of whole factors, which has no scale."""
    if lycoris.is_lycoris(parts.keys):
        return lycoris.rank(source, parts.keys) or scale.whole_rank(module)
    experts = 1 if parts.stack is None else parts.stack.experts
    return source[parts.keys["A"]].shape[0] // experts


def shape_of(source: Checkpoint, parts: Module, of_peft: bool) -> tuple[int, ...] | Skipped:
    """The shape of the product of the factors, or the reason to skip it."""
    others = lycoris.is_lycoris(parts.keys)
    if parts.magnitudes is not None and "E" in parts.keys:
        return Skipped(SkipReason.UNSUPPORTED, "has AdaLoRA's singular values and a DoRA's magnitudes")
    if not others and set(parts.keys) - {"E", "mid", "bias"} != (set() if parts.bias_of else {"A", "B"}):
        return Skipped(SkipReason.PARTS, f"only {' '.join(parts.keys)} of A and B is there")
    for key in parts.keys.values():
        if source[key].dtype.name not in ADD_DTYPES:
            raise SourceError(
                f"{source.root}: {key!r} is {source[key].dtype.name}; LoRA factors are {', '.join(ADD_DTYPES)}"
            )
    if parts.stack is not None:
        if parts.magnitudes is not None:
            return Skipped(SkipReason.UNSUPPORTED, "is a DoRA of a parameter by its name, which PEFT does not make")
        return parts.stack.shape
    if others:
        if of_peft and "lokr_w2" in parts.keys and len(source[parts.keys["lokr_w2"]].shape) == 3:
            return Skipped(
                SkipReason.UNSUPPORTED,
                "PEFT takes the dimensions of a one-dimensional convolution's LoKr in another order; merge it first",
            )
        return lycoris.matrix_shape(source, parts.keys)
    if parts.bias_of is not None:
        return source[parts.keys["bias"]].shape
    a, b = source[parts.keys["A"]].shape, source[parts.keys["B"]].shape
    core = source[parts.keys["mid"]].shape if "mid" in parts.keys else None
    if core is not None and (len(core) < 3 or core[:2] != (b[1:2] + a[:1]) or math.prod(a[2:]) != 1):
        return Skipped(SkipReason.PARTS, f"shapes {list(b)}, {list(core)} and {list(a)} do not multiply")
    if not 2 <= len(b) <= len(a) <= 5 or a[0] != b[1] or not a[0]:
        return Skipped(SkipReason.PARTS, f"shapes {list(b)} and {list(a)} do not multiply")
    if "E" in parts.keys and source[parts.keys["E"]].numel != a[0]:
        return Skipped(SkipReason.PARTS, f"E has {count(source[parts.keys['E']].numel, 'value')} for rank {a[0]}")
    if math.prod(b[2:]) != 1:
        return Skipped(SkipReason.PARTS, f"B of shape {list(b)} is not a 1 x 1 convolution")
    return (b[0], *a[1:]) if core is None else (b[0], a[1], *core[2:])


@lycoris.no_remarks
def _product(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * B A (transposed if `swap`), a few rows at a time."""
    rank = source[parts.keys["A"]].shape[0]
    b, a = (to_float32(source.bits(key), source[key].dtype.name) for key in (parts.keys["B"], parts.keys["A"]))
    left, right = b.reshape(-1, rank), a.reshape(rank, -1)
    if "mid" in parts.keys:
        core = source[parts.keys["mid"]]
        bits = source.bits(parts.keys["mid"])
        right = lycoris.through(to_float32(bits, core.dtype.name).reshape(core.shape), right)
    if "E" in parts.keys:  # AdaLoRA's singular values
        right = right * to_float32(source.bits(parts.keys["E"]), source[parts.keys["E"]].dtype.name).reshape(rank, 1)
    if swap:
        left, right = right.T, left.T
    scaled: Float32 = np.ascontiguousarray(left) * np.float32(factor)
    right = np.ascontiguousarray(right)

    @lycoris.no_remarks
    def product(start: int, stop: int) -> Float32:
        made: Float32 = scaled[start:stop] @ right
        return made

    return lycoris.in_rows(product, right.shape[1], shape)


def _bias(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * what is added to a bias."""
    key = parts.keys["bias"]
    bits = source.bits(key)
    if not bits.size:
        raise SourceError(f"{source.root}: {key!r} has no elements; get the file again")
    with np.errstate(over="ignore", invalid="ignore"):
        change = to_float32(bits, source[key].dtype.name).reshape(row_shape(shape)) * np.float32(factor)
    return lambda start, stop: change[start:stop]


def _stacked(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * the change of a parameter that PEFT adapts by name."""
    assert parts.stack is not None
    return stacked_rows(source, parts, parts.stack, factor)


def _lycoris(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * the change of a LoHa or LoKr, a few rows at a time."""
    return lycoris.in_rows(lycoris.matrix_rows(source, parts.keys, factor), math.prod(shape[1:]), shape)


def is_flat(matrix: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a matrix is a convolution of that shape with its trailing dimensions flat."""
    return len(shape) > 2 and matrix == (shape[0], math.prod(shape[1:]))
