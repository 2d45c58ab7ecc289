"""Where torch tensors and NumPy arrays have their elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shiradelta.format.arithmetic import Array
from shiradelta.models.names import Shape

if TYPE_CHECKING:
    import torch


class Span(NamedTuple):
    """A range of a device's memory.

    Attributes:
        device: "cpu", "cuda:0" and so on.
        start: the first byte.
        end: the byte after the last.
    """

    device: str
    start: int
    end: int

    def holds(self, other: Span) -> bool:
        """Whether another range lies in this one."""
        return self.device == other.device and self.start <= other.start and other.end <= self.end


def is_array(tensor: Any) -> bool:
    """Whether the tensor is a NumPy array."""
    return isinstance(tensor, np.ndarray)


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed.")


def own_part(tensor: Any) -> Any:
    """What this process has of a tensor: its part of a DTensor, and all of another."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def has_elements(tensor: Any) -> bool:
    """Whether a tensor or array has its elements in memory one by one, whatever a subclass says of their meaning."""
    if is_array(tensor):
        return True
    import torch

    is_wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not is_wrapper and tensor.layout is torch.strided and not tensor.is_meta


def bare(tensor: Any) -> Any:
    """A tensor without gradient and subclass, in the same memory; an array as it is."""
    if is_array(tensor):
        return tensor
    import torch

    return tensor.detach().as_subclass(torch.Tensor)


def flat_bits(tensor: torch.Tensor) -> Array:
    """A torch tensor's elements, row by row, as unsigned integers in NumPy; a copy only where they lie otherwise."""
    import torch

    flat, size = tensor.reshape(-1), tensor.element_size()
    if not flat.numel():
        return np.zeros(0, f"<u{size}")
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    found: Array = flat.contiguous().view(signed).cpu().numpy().view(f"<u{size}")
    return found


def address_of(tensor: Any) -> int:
    """The address of the first element."""
    return int(tensor.ctypes.data if is_array(tensor) else tensor.data_ptr())


def strides_of(tensor: Any) -> Shape:
    """The strides in elements."""
    return tuple(stride // tensor.itemsize for stride in tensor.strides) if is_array(tensor) else tuple(tensor.stride())


def is_contiguous(tensor: Any) -> bool:
    """Whether the elements lie row by row."""
    return bool(tensor.flags.c_contiguous if is_array(tensor) else tensor.is_contiguous())


def span_of(tensor: Any) -> Span:
    """The range that the elements span."""
    if is_contiguous(tensor):
        start = address_of(tensor)
        return Span(str(getattr(tensor, "device", "cpu")), start, start + tensor.nbytes)
    reach = [s * tensor.itemsize * (size - 1) for s, size in zip(strides_of(tensor), tensor.shape, strict=True)]
    start = address_of(tensor)
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return Span(str(getattr(tensor, "device", "cpu")), start + low, start + high + tensor.itemsize)
