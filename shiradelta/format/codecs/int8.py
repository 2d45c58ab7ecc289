"""I8: fl32(scale q), q of 8 bits (FORMAT.md, sections 5 and 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, from_bfloat16
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


class Int8(TorchDecoder, TorchRounder):
    """I8; a section has scales, codes, slack."""

    id = ValueId.I8
    name = "I8"
    option = "int8"

    def size(self, nnz: int, size: int) -> int:
        return self.codes_at(nnz) + registry.align(nnz, 4) + registry.SLACK

    def codes_at(self, nnz: int) -> int:
        return registry.align(group_count(nnz) * 2, 4)

    def encode(self, values: Array) -> bytes:
        """Scales each group by its largest magnitude."""
        groups = grouped(values, 0)
        bits, scale = parameter(np.abs(groups).max(axis=1) / np.float32(127))
        with np.errstate(over="ignore"):
            check_fit(scale, largest=scale * np.float32(128))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.where(scale > 0, np.clip(np.rint(groups / scale), -127, 127), 0)
        codes = codes.reshape(-1)[: values.size].astype(np.int8)
        return padded(bits.astype("<u2").tobytes()) + padded(codes.tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        (scale,) = parameters_of(data, 1, start, stop)
        codes = part(data, self.codes_at(nnz) + start, stop - start, "i1")
        values: Array = scale * codes.astype(np.float32)
        return values

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
        codes = self.codes_at(nnz)
        return [parameters_span(1, start, stop), (codes + start, codes + stop)]

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        groups = group_count(nnz)
        bits = part(data, 0, groups, "<u2")
        with np.errstate(over="ignore", invalid="ignore"):
            check_parameters(bits, from_bfloat16(bits) * np.float32(128))
        if data[2 * groups : self.codes_at(nnz)].any():
            raise FormatError("padding_not_zero", "behind the scales")
        check_zero(data, self.codes_at(nnz) + nnz)

    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        import torch

        group = torch.arange(nnz, device=data.device) // GROUP
        scale = data[: 2 * group_count(nnz)].view(torch.bfloat16).float()[group]
        codes = self.codes_at(nnz)
        return scale * data[codes : codes + nnz].view(torch.int8).float()

    def round_torch(self, groups: torch.Tensor) -> torch.Tensor:
        import torch

        scale = parameter_torch(groups.abs().nan_to_num(0).amax(1) / 127)
        return scale * torch.where(scale > 0, (groups / scale).round().clamp(-127, 127), 0)
