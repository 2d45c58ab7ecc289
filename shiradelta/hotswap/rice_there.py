"""RICE made on a device, in torch operations: positions that are there become the sections that kernels decode.

Several tensors are encoded at once, one after the other (FORMAT.md, 4.2).
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from shiradelta.format import registry
from shiradelta.format.codecs.packing import field_words
from shiradelta.format.codecs.rice import section_size
from shiradelta.hotswap.bits_there import sent

Tensor = torch.Tensor


class RiceThere(NamedTuple):
    """A section on a device, and room behind it.

    Attributes:
        whole: uint8, with the sections of all tensors.
        start: where this one starts, a multiple of 64.
        stop: where it ends.
        room: where the room behind it starts, the next multiple of 64.
        k: that of its head.
        unary_bits: that of its head.
    """

    whole: Tensor
    start: int
    stop: int
    room: int
    k: int
    unary_bits: int


def likely_k(nnz: int, numel: int) -> int:
    """The k that is best for so many positions if they are independent: no pass over them is needed to know it.

    Together, zeros are at most numel / 2^k, whatever the positions are.
    """
    ks = np.arange(registry.MAX_RICE_K + 1)
    odds = min(nnz / numel, 1 - 2.0**-40)
    bits = ks - 1 / np.expm1(np.log1p(-odds) * 2.0**ks)
    return int(np.argmin(bits))


def encode_there(
    positions: Tensor, counts: Sequence[int], numels: Sequence[int], rooms: Sequence[int]
) -> list[RiceThere]:
    """The sections of some tensors' positions.

    Args:
        positions: int32 or int64, increasing in each tensor, one tensor after the other.
        counts: how many each of them has, at least one.
        numels: elements of each tensor.
        rooms: bytes to leave behind each section, which are zero.
    """
    device, several = positions.device, len(counts) > 1
    starts = [*accumulate(counts, initial=0)]
    ks = [likely_k(count, numel) for count, numel in zip(counts, numels, strict=True)]

    def spread(numbers: Sequence[int], dtype: torch.dtype) -> Tensor | int:
        """A number of each tensor for all of its positions."""
        if not several:
            return numbers[0]
        each = sent(np.array([numbers, counts]), device)
        return torch.repeat_interleave(each[0].to(dtype), each[1], output_size=starts[-1])

    firsts, stops = sent(np.array([starts[:-1], starts[1:]]), device)
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    gaps[firsts] = positions[firsts]
    k = spread(ks, positions.dtype)
    # Behind each one: the bits up to it, counted from the first tensor's first bit.
    ends = ((gaps >> k) + 1).cumsum(0)
    lasts = ends[stops - 1].tolist()
    unary = [last - before for last, before in zip(lasts, [0, *lasts], strict=False)]

    places = _RicePlaces.of(counts, numels, ks, unary, rooms)
    words = torch.zeros(places.words, dtype=torch.int32, device=device)
    heads = np.array([(k, 0, bits & 0xFFFFFFFF, bits >> 32) for k, bits in zip(ks, unary, strict=True)], np.uint32)
    at = np.array(places.sections)[:, None] + np.arange(4)
    words[sent(at, device)] = sent(heads.view(np.int32), device)
    _put_directories(words, places, positions, ends, starts, [0, *lasts], ks, unary)

    if any(ks):
        rank = torch.arange(starts[-1], device=device)
        to_low = [32 * word - start * k for word, start, k in zip(places.low, starts, ks, strict=False)]
        low_at = rank * k + spread(to_low, torch.int64)
        low = (gaps & ((1 << k) - 1)).long() << (low_at & 31)
        # Fields do not overlap, so that sums put them together; the slack follows the last one.
        words.scatter_add_(0, low_at >> 5, low.to(torch.int32))
        words.scatter_add_(0, (low_at >> 5) + 1, (low >> 32).to(torch.int32))
        del rank, low_at, low
    to_unary = [32 * word - before - 1 for word, before in zip(places.unary, [0, *lasts], strict=False)]
    bit = ends + spread(to_unary, torch.int64)
    words.scatter_add_(0, bit >> 5, torch.ones_like(bit, dtype=torch.int32) << (bit & 31).to(torch.int32))
    whole = words.view(torch.uint8)
    return [
        RiceThere(whole, 4 * word, 4 * word + size, 4 * word + aligned(size), k, bits)
        for word, size, k, bits in zip(places.sections, places.sizes, ks, unary, strict=True)
    ]


class _RicePlaces(NamedTuple):
    """Where sections and their parts are in one array of words: the words' numbers."""

    sections: list[int]
    low: list[int]
    unary: list[int]
    sizes: list[int]  # bytes of each section
    words: int  # of all

    @classmethod
    def of(
        cls,
        counts: Sequence[int],
        numels: Sequence[int],
        ks: Sequence[int],
        unary_bits: Sequence[int],
        rooms: Sequence[int],
    ) -> _RicePlaces:
        sizes = [section_size(*each) for each in zip(counts, numels, ks, unary_bits, strict=True)]
        both = ((aligned(size) + aligned(room)) // 4 for size, room in zip(sizes, rooms, strict=True))
        *sections, words = accumulate(both, initial=0)
        unary = [
            section + (size - registry.SLACK) // 4 - -(-bits // 32)
            for section, size, bits in zip(sections, sizes, unary_bits, strict=True)
        ]
        low = [at - field_words(count, k) for at, count, k in zip(unary, counts, ks, strict=True)]
        return cls(sections, low, unary, sizes, words)


def aligned(size: int) -> int:
    """A size up to where the next section starts."""
    return registry.align(size, registry.SECTION_ALIGNMENT)


def _put_directories(
    words: Tensor,
    places: _RicePlaces,
    positions: Tensor,
    ends: Tensor,
    starts: Sequence[int],
    before: Sequence[int],
    ks: Sequence[int],
    unary: Sequence[int],
) -> None:
    """Writes base and rank of each block: the position and the one before it tell them.

    Args:
        words: the sections.
        places: where they are in it.
        positions: of all tensors.
        ends: the bits up to each one, of all tensors.
        starts: the first position of each tensor.
        before: the bits before each tensor.
        ks: of each tensor.
        unary: bits of each tensor.
    """
    blocks = -(-np.array(unary) // registry.BLOCK_BITS)
    tensor = np.repeat(np.arange(blocks.size), blocks)
    number = np.arange(tensor.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    low, sections, start, bits_before, k = (
        np.array(each)[tensor]
        for each in (places.low, places.sections, starts[: blocks.size], before[: blocks.size], ks)
    )
    head = registry.RICE_HEAD.size // 4
    size = (low - sections - head) // blocks[tensor] // 2  # words of a number
    at = sections + head + 2 * size * number
    rows = np.stack((number * registry.BLOCK_BITS, bits_before, start, k, at, size))
    edge, bits_before_, start_, k_, at_, size_ = sent(rows, words.device)
    rank = torch.searchsorted(ends, bits_before_ + edge, right=True) - start_
    some = rank > 0
    last = (start_ + rank - 1).clamp(min=0)
    position = torch.where(some, positions[last], -1)
    bits = torch.where(some, ends[last] - bits_before_, 0)
    base = position + 1 + ((edge - bits) << k_)
    for place, numbers in (at_, base), (at_ + size_, rank):
        words[place] = numbers.to(torch.int32)
    if int(size.max()) > 1:
        wide = size_ > 1
        for place, numbers in (at_, base), (at_ + size_, rank):
            words[place[wide] + 1] = (numbers[wide] >> 32).to(torch.int32)
