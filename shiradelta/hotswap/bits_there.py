"""Bitmaps and fields of bits on a device, in torch operations."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def bits_of(bitmap: Tensor) -> Tensor:
    """uint8, 0 or 1: each bit of bytes, bit 0 first."""
    eight = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap[:, None] >> eight) & 1).view(-1)


def ones_of(bitmap: Tensor) -> Tensor:
    """int64, increasing: the bits of bytes that are set."""
    return bits_of(bitmap).nonzero().view(-1)


def fields_at(data: Tensor, at: Tensor, widths: Tensor) -> Tensor:
    """int64, fields of up to 32 bits.

    Args:
        data: uint8, whole words of 4 bytes.
        at: int64, the first bit of each field; those beyond `data` are taken from its last two words.
        widths: int64, of each field.
    """
    words = data.view(torch.int32)
    word = (at >> 5).clamp(min=0, max=words.numel() - 2)
    pair = (words[word].long() & 0xFFFFFFFF) | (words[word + 1].long() << 32)
    return (pair >> (at & 31)) & ((1 << widths) - 1)
