"""LoHa and LoKr (LyCORIS, PEFT): a Hadamard product of two low-rank matrices, a Kronecker product of two small ones.

LoHa (FedPara, arXiv:2108.06098): (w1_a w1_b) * (w2_a w2_b).  LoKr (arXiv:2309.14859): w1 (x) w2, each of which may be
a product w_a w_b itself.  For a convolution the right factors hold all trailing dimensions, flat; or a Tucker core t
[rank, rank, kernel] stands between the factors, which are [rank, out] and [rank, in] then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.select.topk import Rows, row_shape

from .item import Skipped, SkipReason

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
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
        cores = {key for key in keys if key in _CORES}
        if set(keys) - cores != set(_LOHA) or len(cores) == 1:
            wanted = (*_LOHA, *(_CORES if cores else ()))
            return Skipped(SkipReason.PARTS, f"only {' '.join(sorted(keys))} of {' '.join(wanted)} is there")
        sides = [
            _product_shape(*(shapes.get(f"hada_{part}") for part in (f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2)
        ]
        if None in sides or sides[0] != sides[1]:
            why = f"its factors do not multiply: {', '.join(map(str, map(list, shapes.values())))}"
            return Skipped(SkipReason.PARTS, why)
        assert sides[0] is not None
        return sides[0]
    if not all(part.startswith("lokr_") for part in keys):
        return Skipped(SkipReason.PARTS, f"{' '.join(sorted(keys))} are of several methods")
    factors = [_factor_shape(shapes, f"lokr_w{n}") for n in (1, 2)]
    used = {part for n in (1, 2) for part in _factor_parts(keys, n)}
    if factors[0] is None or factors[1] is None or used != set(keys):
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
        return to_float32(source.bits(keys[part]), slot.dtype.name).reshape(slot.shape)

    def pair(side: str, core: str) -> tuple[Float32, Float32]:
        a, b = read(f"{side}_a"), read(f"{side}_b")
        if core not in keys:
            return a, b.reshape(len(b), -1)
        return np.ascontiguousarray(a.T), through(read(core), b)

    scale = np.float32(factor)
    if "hada_w1_a" in keys:
        (a1, b1), (a2, b2) = pair("hada_w1", "hada_t1"), pair("hada_w2", "hada_t2")

        @no_remarks
        def hadamard(start: int, stop: int) -> Float32:
            product: Float32 = (a1[start:stop] @ b1) * (a2[start:stop] @ b2) * scale
            return product

        return hadamard
    halves = [
        read(f"lokr_w{n}") if f"lokr_w{n}" in keys else np.matmul(*pair(f"lokr_w{n}", f"lokr_t{n}")) for n in (1, 2)
    ]
    one, two = (half.reshape(len(half), -1) for half in halves)
    one = one * scale

    @no_remarks
    def kronecker(start: int, stop: int) -> Float32:
        rows = np.arange(start, stop)
        outer = one[rows // len(two)][:, :, None] * two[rows % len(two)][:, None, :]
        return np.ascontiguousarray(outer.reshape(len(rows), -1), np.float32)

    return kronecker


def through(core: Float32, right: Float32) -> Float32:
    """The right factor [rank, in * kernel] of a Tucker decomposition, of its core and `right` [rank, in]."""
    made = np.einsum("ij...,jr->ir...", core, right.reshape(len(right), -1), optimize=True)
    return np.ascontiguousarray(made.reshape(len(core), -1), np.float32)


def in_rows(matrix: MatrixRows, width: int, shape: tuple[int, ...]) -> Rows:
    """Reads a matrix of `width` columns in rows of `row_shape`; one row of the matrix may hold several."""
    columns = row_shape(shape)[1]
    pieces = width // columns if columns else 1

    def rows(start: int, stop: int) -> Float32:
        first = start // pieces
        made = matrix(first, -(-stop // pieces))
        return made.reshape(-1, columns)[start - first * pieces : stop - first * pieces]

    return rows


def _product_shape(
    a: tuple[int, ...] | None, b: tuple[int, ...] | None, core: tuple[int, ...] | None = None
) -> tuple[int, int] | None:
    if a is None or b is None or len(a) != 2 or len(b) < 2:
        return None
    if core is None:
        return (a[0], math.prod(b[1:])) if a[1] == b[0] else None
    fits = len(core) > 2 and core[:2] == (a[0], b[0]) and len(b) == 2
    return (a[1], b[1] * math.prod(core[2:])) if fits else None


def _factor_parts(keys: Mapping[str, str], n: int) -> tuple[str, ...]:
    """The parts that make a factor of a LoKr."""
    side = f"lokr_w{n}"
    core = tuple(part for part in keys if part == f"lokr_t{n}")
    return (side,) if side in keys else (f"{side}_a", f"{side}_b", *core)


def _factor_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int] | None:
    if name in shapes:
        return (shapes[name][0], math.prod(shapes[name][1:])) if len(shapes[name]) >= 2 else None
    if f"{name}_a" in shapes and f"{name}_b" in shapes:
        return _product_shape(shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(name.replace("w", "t")))
    return None
