"""Arrays that are sent to a device, and bitmaps and fields of bits there, in torch operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.format.arithmetic import Positions
from shiradelta.util.arrays import exclusive

Tensor = torch.Tensor
#: Bytes that CUDA takes over before a copy returns, whatever memory they are in; pinning takes longer than that.
_STAGED = 1 << 16


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copies an array to a device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and array.nbytes > _STAGED:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def owners(counts: Positions, device: torch.device) -> Tensor:
    """int32: the number of what each thing belongs to, given how many things each has, in this order."""
    ends = np.cumsum(counts)
    every = torch.arange(int(ends[-1]) if ends.size else 0, device=device)
    return torch.searchsorted(sent(ends, device), every, right=True, out_int32=True)


def joined(data: Tensor, starts: Positions, stops: Positions) -> Tensor:
    """Parts of bytes, one after the other; they start and stop at multiples of 4."""
    counts = (stops - starts) // 4
    part = owners(counts, data.device)
    shift = sent(starts // 4 - exclusive(counts), data.device)
    words = data.view(torch.int32)[shift[part] + torch.arange(part.numel(), device=data.device)]
    return words.view(torch.uint8)


def bits_of(bitmap: Tensor) -> Tensor:
    """uint8, 0 or 1: each bit of bytes, bit 0 first."""
    eight = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap[:, None] >> eight) & 1).view(-1)


def ones_of(bitmap: Tensor) -> Tensor:
    """int64, increasing: the bits of bytes that are set."""
    return bits_of(bitmap).nonzero().view(-1)


def fields_at(data: Tensor, at: Tensor, widths: Tensor | int) -> Tensor:
    """int64, fields of up to 32 bits, which may cross into the next word.

    Args:
        data: whole words of 4 bytes, at least two.
        at: int64, the first bit of each field; those beyond `data` are taken from its last two words.
        widths: int64, of each field, or of all.
    """
    words = data.view(torch.int32)
    word = (at >> 5).clamp(min=0, max=words.numel() - 2)
    pair = (words[word].long() & 0xFFFFFFFF) | (words[word + 1].long() << 32)
    return (pair >> (at & 31)) & ((1 << widths) - 1)
