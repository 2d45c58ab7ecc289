"""I4: a sign and fl32(lo + fl32(step code)), code of 3 bits (FORMAT.md, sections 5 and 8).

The largest of a tensor's changes have a hole around zero, on which codes that are symmetric around zero waste half of
their range; hence a sign and an affine magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Float32, from_bfloat16
from shiradelta.format.codecs.base import SLACK, Bytes, TorchDecoder, TorchRounder, check_zero, padded, part
from shiradelta.format.codecs.groups import (
    GROUP,
    check_fit,
    check_parameters,
    group_count,
    grouped,
    parameter,
    parameter_torch,
    parameters_of,
    parameters_span,
)
from shiradelta.format.registry import ValueId

if TYPE_CHECKING:
    import torch


class Int4(TorchDecoder, TorchRounder):
    """I4; a section has pairs (lo, step), nibbles, slack."""

    id = ValueId.I4
    name = "I4"
    option = "int4"
    idempotent = False  # the smallest magnitude need not be among the codes

    def size(self, nnz: int, size: int) -> int:
        return self.codes_at(nnz) + registry.align(-(-nnz // 2), 4) + registry.SLACK

    def codes_at(self, nnz: int) -> int:
        return 4 * group_count(nnz)

    def encode(self, values: Array) -> bytes:
        """Takes lo and step from the smallest and the largest magnitude of each group."""
        magnitude = np.abs(values)
        least = grouped(magnitude, np.inf).min(axis=1)
        most = grouped(magnitude, 0).max(axis=1)
        lo_bits, lo = parameter(least)
        with np.errstate(over="ignore", invalid="ignore"):
            step_bits, step = parameter(np.maximum((most - lo[:, 0]) / np.float32(7), 0))
            check_fit(lo, step, largest=lo + step * np.float32(7))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.where(step > 0, np.clip(np.rint((grouped(magnitude, 0) - lo) / step), 0, 7), 0)
        nibbles = np.zeros(values.size + values.size % 2, np.uint8)
        nibbles[: values.size] = codes.reshape(-1)[: values.size].astype(np.uint8) | (np.signbit(values) << 3)
        parameters = np.stack([lo_bits, step_bits], axis=1).astype("<u2").tobytes()
        return parameters + padded((nibbles[::2] | (nibbles[1::2] << 4)).tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        lo, step = parameters_of(data, 2, start, stop)
        packed = part(data, self.codes_at(nnz) + start // 2, -(-stop // 2) - start // 2, "u1")
        nibbles = np.empty(2 * packed.size, np.uint8)
        nibbles[::2], nibbles[1::2] = packed & 15, packed >> 4
        nibbles = nibbles[start % 2 : start % 2 + stop - start]
        magnitude: Float32 = lo + step * (nibbles & 7).astype(np.float32)
        return np.where(nibbles & 8, -magnitude, magnitude)

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
        codes = self.codes_at(nnz)
        return [parameters_span(2, start, stop), (codes + start // 2, codes + -(-stop // 2))]

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        groups = group_count(nnz)
        bits = part(data, 0, 2 * groups, "<u2")
        lo, step = from_bfloat16(bits).reshape(groups, 2).T
        with np.errstate(over="ignore", invalid="ignore"):
            check_parameters(bits, lo + step * np.float32(7))
        end = self.codes_at(nnz) + -(-nnz // 2)
        if nnz % 2 and data[end - 1] >> 4:
            raise FormatError("padding_not_zero", "the last nibble")
        check_zero(data, end)

    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        import torch

        codes = self.codes_at(nnz)
        rank = torch.arange(nnz, device=data.device)
        group = rank // GROUP
        lo, step = data[:codes].view(torch.bfloat16).float().view(-1, 2).unbind(1)
        nibble = (data[codes + rank // 2] >> (rank % 2 * 4).to(torch.uint8)) & 15
        magnitude = lo[group] + step[group] * (nibble & 7).float()
        return torch.where(nibble > 7, -magnitude, magnitude)

    def round_torch(self, groups: torch.Tensor) -> torch.Tensor:
        import torch

        magnitude = groups.abs()
        lo = parameter_torch(magnitude.nan_to_num(torch.inf).amin(1))
        step = parameter_torch(((magnitude.nan_to_num(0).amax(1) - lo[:, 0]) / 7).clamp(min=0))
        code = torch.where(step > 0, ((magnitude - lo) / step).round().clamp(0, 7), 0)
        return torch.copysign(lo + step * code, groups)
