"""SIGN: plus or minus the mean magnitude of the group (FORMAT.md, sections 5 and 8)."""

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
from shiradelta.format.codecs.packing import pack_flags
from shiradelta.format.registry import ValueId

if TYPE_CHECKING:
    import torch


class Sign(TorchDecoder, TorchRounder):
    """SIGN; a section has magnitudes, a bitmap of the signs, slack."""

    id = ValueId.SIGN
    name = "SIGN"
    option = "sign"

    def size(self, nnz: int, size: int) -> int:
        return self.codes_at(nnz) + 4 * -(-nnz // 32) + registry.SLACK

    def codes_at(self, nnz: int) -> int:
        return registry.align(group_count(nnz) * 2, 4)

    def encode(self, values: Array) -> bytes:
        """Takes the mean in binary64, summed in order."""
        counts = np.minimum(GROUP, values.size - np.arange(0, values.size, GROUP))
        total = np.add.accumulate(grouped(np.abs(values), 0).astype(np.float64), axis=1)[:, -1]
        bits, lo = parameter((total / counts).astype(np.float32))
        check_fit(lo, largest=lo)
        signs = pack_flags(np.signbit(values))
        return padded(bits.astype("<u2").tobytes()) + signs + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        lo: Float32 = parameters_of(data, 1, start, stop)[0]
        packed = part(data, self.codes_at(nnz) + start // 8, -(-stop // 8) - start // 8, "u1")
        minus = np.unpackbits(packed, bitorder="little")[start % 8 : start % 8 + stop - start]
        return np.where(minus, -lo, lo)

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
        codes = self.codes_at(nnz)
        return [parameters_span(1, start, stop), (codes + start // 8, codes + -(-stop // 8))]

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        groups = group_count(nnz)
        bits = part(data, 0, groups, "<u2")
        check_parameters(bits, from_bfloat16(bits))
        if data[2 * groups : self.codes_at(nnz)].any():
            raise FormatError("padding_not_zero", "behind the magnitudes")
        end = self.codes_at(nnz) + -(-nnz // 8)
        if nnz % 8 and data[end - 1] >> (nnz % 8):
            raise FormatError("padding_not_zero", "unused sign bits")
        check_zero(data, end)

    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        import torch

        rank = torch.arange(nnz, device=data.device)
        lo = data[: 2 * group_count(nnz)].view(torch.bfloat16).float()[rank // GROUP]
        minus = (data[self.codes_at(nnz) + rank // 8] >> (rank % 8).to(torch.uint8)) & 1
        return torch.where(minus > 0, -lo, lo)

    def round_torch(self, groups: torch.Tensor) -> torch.Tensor:
        import torch

        # Binary64, as `encode` sums; the order of so few terms cannot show after rounding to bf16, ties aside.
        return torch.copysign(parameter_torch(groups.abs().double().nanmean(1).float()), groups)
