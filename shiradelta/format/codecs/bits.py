"""BITS: elements of the tensor's own dtype, as they are (FORMAT.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs.base import Bytes, TorchDecoder, check_zero, part, with_slack
from shiradelta.format.registry import ValueId

if TYPE_CHECKING:
    import torch


def bits_dtype(size: int) -> torch.dtype:
    """Torch's integer dtype for the bits of elements of `size` bytes, which every device can index and compare."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


class Bits(TorchDecoder):
    """BITS; a section has elements, padding, slack."""

    id = ValueId.BITS
    name = "BITS"
    option = None
    adds = False

    def size(self, nnz: int, size: int) -> int:
        return registry.align(nnz * size, 4) + registry.SLACK

    def encode(self, values: Array) -> bytes:
        return with_slack(np.ascontiguousarray(values, values.dtype.newbyteorder("<")))

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        return part(data, start * size, stop - start, f"<u{size}")

    def cut(self, data: Bytes, size: int, start: int, stop: int) -> bytes:
        return with_slack(part(data, start * size, stop - start, f"<u{size}"))

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
        return [(start * size, stop * size)]

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        check_zero(data, nnz * size)

    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        return data[: nnz * size].view(bits_dtype(size))
