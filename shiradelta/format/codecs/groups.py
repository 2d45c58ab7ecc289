"""Groups of 128 values that share bf16 parameters: what I8, I4 and SIGN have in common (FORMAT.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Float32, bfloat16_bits, from_bfloat16
from shiradelta.format.codecs.base import Bytes, part

if TYPE_CHECKING:
    import torch

GROUP = registry.GROUP


def group_count(nnz: int) -> int:
    """Number of groups of `nnz` values; the last one may be shorter."""
    return -(-nnz // GROUP)


def grouped(values: Float32, fill: float) -> Float32:
    """Values as [groups, 128], with the last group filled up."""
    groups = group_count(values.size)
    result = np.full(groups * GROUP, fill, np.float32)
    result[: values.size] = values
    return result.reshape(groups, GROUP)


def parameters_of(data: Bytes, count: int, start: int, stop: int) -> Float32:
    """The parameters of the nonzeros with ranks from start to stop - 1: float32 [count, stop - start].

    Args:
        data: a section that begins with the groups' parameters, in bf16.
        count: parameters of a group.
        start: the first rank.
        stop: the rank behind the last.
    """
    first, last = start // GROUP, group_count(stop)
    bits = part(data, 2 * count * first, count * (last - first), "<u2")
    of_groups = from_bfloat16(bits).reshape(-1, count).T
    return of_groups.repeat(GROUP, axis=1)[:, start - first * GROUP : stop - first * GROUP]


def parameters_span(count: int, start: int, stop: int) -> tuple[int, int]:
    """Where a section has what `parameters_of` reads."""
    return 2 * count * (start // GROUP), 2 * count * group_count(stop)


def parameter(values: Float32) -> tuple[Array, Float32]:
    """Rounds to bf16: (bits, the same as float32 in a column)."""
    bits = bfloat16_bits(values)
    return bits, from_bfloat16(bits)[:, None]


def parameter_torch(values: torch.Tensor) -> torch.Tensor:
    """Rounds to bf16, in torch: float32 in a column."""
    return values.bfloat16().float().unsqueeze(1)


def check_parameters(bits: Array, largest: Float32) -> None:
    """Checks that signs are clear and that the largest magnitude that the parameters allow is finite."""
    if np.any(bits >> 15) or not np.all(np.isfinite(largest)):
        raise FormatError("bad_value", "a group's parameter is negative or too large")


def check_fit(*parameters: Float32, largest: Float32) -> None:
    """Raises DeltaError where values are too large for their codec."""
    if not all(np.all(np.isfinite(p)) for p in parameters) or not np.all(np.isfinite(largest)):
        raise DeltaError("values this large do not fit the codec; take f32 or bf16")
