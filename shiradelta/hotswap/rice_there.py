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
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.packing import field_words
from shiradelta.format.codecs.rice import section_size
from shiradelta.hotswap.bits_there import owners, sent
from shiradelta.util.arrays import exclusive

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


def likely_ks(counts: Positions, numels: Positions) -> Positions:
    """The k that is best for so many positions of each tensor if they are independent: no pass over them tells it.

    Together, zeros are at most numel / 2^k, whatever the positions are.
    """
    ks = np.arange(registry.MAX_RICE_K + 1)
    odds = np.minimum(counts / numels, 1 - 2.0**-40)[:, None]
    found: Positions = np.argmin(ks - 1 / np.expm1(np.log1p(-odds) * 2.0**ks), axis=1)
    return found


class TorchRice:
    """Encodes the positions of some tensors in torch operations, which many nonzeros need many passes for.

    Args:
        positions: int32 or int64, increasing in each tensor, one tensor after the other.
        counts: how many each of them has, at least one.
        ks: of each tensor.
    """

    def __init__(self, positions: Tensor, counts: Sequence[int], ks: Sequence[int]) -> None:
        self.positions = positions
        self._counts, self._ks, self._starts = counts, ks, exclusive(np.array(counts)).tolist()

    def _spread(self, numbers: Sequence[int], dtype: torch.dtype) -> Tensor | int:
        """A number of each tensor for all of its positions."""
        if len(numbers) == 1:
            return numbers[0]
        each = sent(np.array([numbers, self._counts]), self.positions.device)
        return torch.repeat_interleave(each[0].to(dtype), each[1], output_size=self.positions.numel())

    def _gaps(self) -> Tensor:
        gaps = self.positions.diff(prepend=self.positions.new_full((1,), -1)) - 1
        firsts = sent(np.array(self._starts), gaps.device)
        gaps[firsts] = self.positions[firsts]
        return gaps

    def ends(self) -> Tensor:
        """Int64, of each position: the unary bits up to its one, with those of all tensors before."""
        return ((self._gaps() >> self._spread(self._ks, self.positions.dtype)) + 1).cumsum(0)

    def put(self, words: Tensor, places: RicePlaces, ends: Tensor, before: Sequence[int]) -> None:
        """Writes low fields and unary bits.

        Args:
            words: int32, all sections; zero there.
            places: where their parts are.
            ends: what `ends` gave.
            before: unary bits before each tensor.
        """
        if any(self._ks):
            k = self._spread(self._ks, self.positions.dtype)
            low = [32 * word - start * k for word, start, k in zip(places.low, self._starts, self._ks, strict=True)]
            at = torch.arange(ends.numel(), device=words.device) * k + self._spread(low, torch.int64)
            fields = (self._gaps() & ((1 << k) - 1)).long() << (at & 31)
            # Fields do not overlap, so that sums put them together; the slack follows the last one.
            words.scatter_add_(0, at >> 5, fields.to(torch.int32))
            words.scatter_add_(0, (at >> 5) + 1, (fields >> 32).to(torch.int32))
        unary = [32 * word - some - 1 for word, some in zip(places.unary, before, strict=True)]
        bit = ends + self._spread(unary, torch.int64)
        words.scatter_add_(0, bit >> 5, torch.ones_like(bit, dtype=torch.int32) << (bit & 31).to(torch.int32))


def encode_there(
    positions: Tensor,
    counts: Sequence[int],
    numels: Sequence[int],
    rooms: Sequence[int],
    encoder: type[TorchRice] = TorchRice,
) -> list[RiceThere]:
    """The sections of some tensors' positions.

    Args:
        positions: int32 or int64, increasing in each tensor, one tensor after the other.
        counts: how many each of them has, at least one.
        numels: elements of each tensor.
        rooms: bytes to leave behind each section, which are zero.
        encoder: does what goes through all positions.
    """
    device = positions.device
    ks = likely_ks(np.array(counts), np.array(numels)).tolist()
    work = encoder(positions, counts, ks)
    ends = work.ends()
    stops = np.cumsum(counts)
    lasts = ends[sent(stops - 1, device)].tolist()
    before = [0, *lasts[:-1]]
    unary = [last - some for last, some in zip(lasts, before, strict=True)]
    places = RicePlaces.of(counts, numels, ks, unary, rooms)
    words = torch.zeros(places.words, dtype=torch.int32, device=device)
    heads = np.array([(k, 0, bits & 0xFFFFFFFF, bits >> 32) for k, bits in zip(ks, unary, strict=True)], np.uint32)
    at = np.array(places.sections)[:, None] + np.arange(4)
    words[sent(at, device)] = sent(heads.view(np.int32), device)
    _put_directories(words, places, positions, ends, (stops - counts).tolist(), before, ks, unary)
    work.put(words, places, ends, before)
    whole = words.view(torch.uint8)
    return [
        RiceThere(whole, 4 * word, 4 * word + size, 4 * word + aligned(size), k, bits)
        for word, size, k, bits in zip(places.sections, places.sizes, ks, unary, strict=True)
    ]


class RicePlaces(NamedTuple):
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
    ) -> RicePlaces:
        """Those of sections one after the other, each with its room behind it; arguments as in `encode_there`."""
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
    places: RicePlaces,
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
    low, sections = np.array(places.low), np.array(places.sections)
    head = registry.RICE_HEAD.size // 4
    sizes = (low - sections - head) // blocks // 2  # words of a number
    of_tensors = sent(np.stack((exclusive(blocks), before, starts, ks, sections + head, sizes)), words.device)
    tensor = owners(blocks, words.device)
    first, bits_before, start, k, at, size = of_tensors[:, tensor]
    number = torch.arange(tensor.numel(), device=words.device) - first
    edge, at = number * registry.BLOCK_BITS, at + 2 * size * number
    rank = torch.searchsorted(ends, bits_before + edge, right=True) - start
    some = rank > 0
    last = (start + rank - 1).clamp(min=0)
    position = torch.where(some, positions[last], -1)
    bits = torch.where(some, ends[last] - bits_before, 0)
    base = position + 1 + ((edge - bits) << k)
    for place, numbers in (at, base), (at + size, rank):
        words[place] = numbers.to(torch.int32)
    if int(sizes.max()) > 1:
        wide = size > 1
        for place, numbers in (at, base), (at + size, rank):
            words[place[wide] + 1] = (numbers[wide] >> 32).to(torch.int32)
