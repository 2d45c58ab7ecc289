"""LoHa and LoKr (LyCORIS, PEFT): a Hadamard product of two low-rank matrices, a Kronecker product of two small ones.

LoHa (FedPara, arXiv:2108.06098): (w1_a w1_b) * (w2_a w2_b).  LoKr (arXiv:2309.14859): w1 (x) w2, each of which may be
a product w_a w_b itself.  For a convolution the right factors hold all trailing dimensions, flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.models.checkpoint import Checkpoint

from .item import Skipped, SkipReason

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
#: Rows [start, stop) of a matrix.
MatrixRows = Callable[[int, int], Float32]
#: An overflow gives infinity or NaN, which the selection refuses with the tensor's name.
no_remarks = np.errstate(over="ignore", invalid="ignore")


def is_lycoris(keys: Mapping[str, str]) -> bool:
    """Whether a module's parts are those of a LoHa or LoKr."""
    return any(part.startswith(("hada_", "lokr_")) for part in keys)


def matrix_shape(source: Checkpoint, keys: Mapping[str, str]) -> tuple[int, int] | Skipped:
    """(rows, columns) of the change, or why there is none."""
    shapes = {part: source[key].shape for part, key in keys.items()}
    if any(0 in shape for shape in shapes.values()):
        return Skipped(SkipReason.PARTS, "one of its factors has no elements")
    if "hada_w1_a" in keys or "hada_w2_a" in keys:
        if set(keys) != set(_LOHA):
            return Skipped(SkipReason.PARTS, f"only {' '.join(sorted(keys))} of {' '.join(_LOHA)} is there")
        sides = [_product_shape(shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"]) for n in (1, 2)]
        if None in sides or sides[0] != sides[1]:
            why = f"its factors do not multiply: {', '.join(map(str, map(list, shapes.values())))}"
            return Skipped(SkipReason.PARTS, why)
        assert sides[0] is not None
        return sides[0]
    if not all(part.startswith("lokr_") for part in keys):
        return Skipped(SkipReason.PARTS, f"{' '.join(sorted(keys))} are of several methods")
    factors = [_factor_shape(shapes, f"lokr_w{n}") for n in (1, 2)]
    if factors[0] is None or factors[1] is None:
        return Skipped(SkipReason.PARTS, f"{' '.join(sorted(keys))} are not two factors")
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]


def rank(source: Checkpoint, keys: Mapping[str, str]) -> int | None:
    """What alpha is divided by; None for a LoKr whose factors are both whole."""
    inner = (part for part in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if part in keys)
    return next((source[keys[part]].shape[0] for part in inner), None)


@no_remarks
def matrix_rows(source: Checkpoint, keys: Mapping[str, str], factor: float) -> MatrixRows:
    """factor * the change, computed a few rows at a time."""

    def read(part: str) -> Float32:
        slot = source[keys[part]]
        return to_float32(source.bits(keys[part]), slot.dtype.name).reshape(slot.shape[0], -1)

    scale = np.float32(factor)
    if "hada_w1_a" in keys:
        a1, b1, a2, b2 = map(read, _LOHA)

        @no_remarks
        def hadamard(start: int, stop: int) -> Float32:
            product: Float32 = (a1[start:stop] @ b1) * (a2[start:stop] @ b2) * scale
            return product

        return hadamard
    one, two = (
        read(f"lokr_w{n}") if f"lokr_w{n}" in keys else read(f"lokr_w{n}_a") @ read(f"lokr_w{n}_b") for n in (1, 2)
    )
    one = one * scale

    @no_remarks
    def kronecker(start: int, stop: int) -> Float32:
        rows = np.arange(start, stop)
        outer = one[rows // len(two)][:, :, None] * two[rows % len(two)][:, None, :]
        return np.ascontiguousarray(outer.reshape(len(rows), -1), np.float32)

    return kronecker


def _product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int] | None:
    return (a[0], math.prod(b[1:])) if len(a) == 2 and len(b) >= 2 and a[1] == b[0] else None


def _factor_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int] | None:
    if name in shapes:
        return (shapes[name][0], math.prod(shapes[name][1:])) if len(shapes[name]) >= 2 else None
    if f"{name}_a" in shapes and f"{name}_b" in shapes:
        return _product_shape(shapes[f"{name}_a"], shapes[f"{name}_b"])
    return None
