"""F32, F16 and BF16: values rounded to a float dtype (FORMAT.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, from_float32, to_float32
from shiradelta.format.codecs.base import Bytes, TorchDecoder, TorchRounder, check_zero, part, with_slack
from shiradelta.util.arrays import ranges

if TYPE_CHECKING:
    import torch


class Float(TorchDecoder, TorchRounder):
    """A codec of one float dtype; a section has elements, padding, slack."""

    option: str

    def __init__(self, id: int, name: str, option: str, dtype: str) -> None:
        self.id, self.name, self.option = id, name, option
        self.dtype = registry.DTYPE_OF_NAME[dtype]

    def size(self, nnz: int, size: int) -> int:
        return registry.align(nnz * self.dtype.size, 4) + registry.SLACK

    def encode(self, values: Array) -> bytes:
        bits = from_float32(values, self.dtype.name)
        if not np.all(np.isfinite(to_float32(bits, self.dtype.name))):
            raise DeltaError(f"a value of {np.abs(values).max():.4g} does not fit {self.dtype.name}; take f32 or bf16")
        return with_slack(bits.astype(self.dtype.bits, copy=False))

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        return to_float32(part(data, start * self.dtype.size, stop - start, self.dtype.bits), self.dtype.name)

    def cut(self, data: Bytes, size: int, start: int, stop: int) -> bytes:
        return with_slack(part(data, start * self.dtype.size, stop - start, self.dtype.bits))

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
        return [(start * self.dtype.size, stop * self.dtype.size)]

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        if not all(np.all(np.isfinite(self.decode(data, nnz, size, start, stop))) for start, stop in ranges(nnz)):
            raise FormatError("bad_value", "a value is not finite")
        check_zero(data, nnz * self.dtype.size)

    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        import torch

        return data[: nnz * self.dtype.size].view(getattr(torch, self.dtype.name)).float()

    def round_torch(self, groups: torch.Tensor) -> torch.Tensor:
        import torch

        return groups.to(getattr(torch, self.dtype.name)).float()
