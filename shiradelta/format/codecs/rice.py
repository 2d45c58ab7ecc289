"""RICE: gaps in split form, in blocks of 2,048 unary bits that decode independently (FORMAT.md, 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, check_positions, check_zero, part, small_lead
from shiradelta.format.codecs.packing import (
    Words,
    count_ones,
    field_words,
    find_ones,
    pack_bitmap,
    pack_fields,
    unpack_fields,
)
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import ranges

BLOCK = registry.BLOCK_BITS


def gaps_of(positions: Positions) -> Positions:
    """p[i] - p[i-1] - 1 with p[-1] = -1."""
    gaps = positions.copy()
    gaps[1:] -= positions[:-1] + 1
    return gaps


def best_k(gaps: Positions) -> int:
    """The smallest k that minimises sum(q) + n k.

    Going from k to k + 1 costs n bits and saves sum(ceil(q / 2)), which never grows with k: so the
    first k at which it saves nothing is the best one.
    """
    k, q = 0, gaps.copy()
    while k < registry.MAX_RICE_K and int(((q + 1) >> 1).sum()) > gaps.size:
        q >>= 1
        k += 1
    return k


def section_size(nnz: int, numel: int, k: int, unary_bits: int) -> int:
    """Bytes of a section."""
    directory = -(-unary_bits // BLOCK) * 2 * registry.word_size(numel)
    words = field_words(nnz, k) + -(-unary_bits // 32)
    return registry.RICE_HEAD.size + directory + 4 * words + registry.SLACK


@dataclass(frozen=True)
class RiceParts:
    """A section taken apart; sizes are checked."""

    k: int
    unary_bits: int
    directory: Array  # [blocks, 2]: base, rank
    low: Words
    unary: Bytes
    end: int  # where the slack starts

    @classmethod
    def of(cls, data: Bytes, nnz: int, numel: int) -> RiceParts:
        """Raises FormatError where head and size contradict each other."""
        k, unary_bits = registry.RICE_HEAD.unpack_from(data.data)
        if k > registry.MAX_RICE_K or data[1:8].any():
            raise FormatError("bad_index", f"k is {k}, or the bytes behind it are not zero")
        if section_size(nnz, numel, k, unary_bits) != data.size:
            raise FormatError("bad_size", f"{data.size} bytes for k {k} and {unary_bits} unary bits")
        word, blocks = registry.word_size(numel), -(-unary_bits // BLOCK)
        low = registry.RICE_HEAD.size + blocks * 2 * word
        unary = low + 4 * field_words(nnz, k)
        end = data.size - registry.SLACK
        return cls(
            k,
            unary_bits,
            part(data, registry.RICE_HEAD.size, blocks * 2, f"<u{word}").reshape(blocks, 2),
            part(data, low, field_words(nnz, k), "<u4"),
            data[unary:end],
            end,
        )

    def low_bits(self, start: int, stop: int) -> Positions:
        """r of the nonzeros with ranks from start to stop - 1."""
        if self.k == 0:
            return np.zeros(stop - start, np.int64)
        return unpack_fields(self.low, self.k, start, stop)


@dataclass
class _Before:
    """What lies before a run of blocks: its ones, and the sum of their r."""

    rank: int = 0
    low_sum: int = 0


def _directory(
    ones: Positions, low_sum: Positions, k: int, start: int, stop: int, before: _Before | None = None
) -> Positions:
    """The expected base and rank of the blocks from bit start to stop, int64 [blocks, 2].

    Args:
        ones: the bits there that are one.
        low_sum: the running sum of r, one for each of `ones`.
        k: that of the section.
        start: a multiple of the block.
        stop: another, or the number of unary bits.
        before: what lies before `start`.
    """
    before = before or _Before()
    edges = np.arange(start, stop, BLOCK, dtype=np.int64)
    inside = np.searchsorted(ones, edges)
    low_before = np.concatenate([[before.low_sum], low_sum])[inside]
    rank = before.rank + inside
    return np.stack([((edges - rank) << k) + low_before + rank, rank], axis=1)


def _checked_directory(directory: Array, numel: int) -> tuple[Positions, Positions]:
    """(bases, ranks) of all blocks.  Raises FormatError where bases do not increase."""
    base, rank = directory.T
    if not base.size or base[0] or rank[0] or np.any(base[1:] < base[:-1]) or base[-1] >= numel:
        raise FormatError("bad_directory", "bases do not increase from 0 to below the number of elements")
    return base.astype(np.int64), rank.astype(np.int64)


def _find_blocks(base: Positions, start: int, stop: int) -> tuple[int, int]:
    """(first, last + 1) of the blocks that can hold positions in [start, stop)."""
    first = max(int(np.searchsorted(base, start, side="right")) - 1, 0)
    return first, max(int(np.searchsorted(base, stop, side="left")), first + 1)


class Blocks(NamedTuple):
    """A run of blocks, from start to stop - 1, of all `blocks` in the section."""

    start: int
    stop: int
    blocks: int


class FoundBlocks(NamedTuple):
    """Blocks that can hold a range of positions.

    Attributes:
        blocks: which.
        ranks: (the first nonzero's, that behind the last's).
        spans: where the section has what they are decoded from, beside its head and directory.
    """

    blocks: Blocks
    ranks: tuple[int, int]
    spans: list[tuple[int, int]]


def blocks_between(
    data: Bytes, nnz: int, numel: int, start: int, stop: int, read: Callable[[int], None]
) -> FoundBlocks:
    """Finds the blocks that `decode_between` decodes, in a section of which only the head is there.

    Args:
        data: the section.
        nnz: number of nonzeros.
        numel: elements of the tensor.
        start: the first position.
        stop: the one behind the last.
        read: makes the section's bytes before an offset be there.

    Raises:
        FormatError: head or directory are wrong.
    """
    k, unary_bits = registry.RICE_HEAD.unpack_from(data.data)
    if k <= registry.MAX_RICE_K and section_size(nnz, numel, k, unary_bits) == data.size:
        read(registry.RICE_HEAD.size + -(-unary_bits // BLOCK) * 2 * registry.word_size(numel))
    parts = RiceParts.of(data, nnz, numel)
    base, rank = _checked_directory(parts.directory, numel)
    if start >= stop:
        return FoundBlocks(Blocks(0, 0, base.size), (0, 0), [])
    first, last = _find_blocks(base, start, stop)
    ranks = int(rank[first]), int(rank[last]) if last < rank.size else nnz
    if not 0 <= ranks[0] <= ranks[1] <= nnz:
        raise FormatError("bad_directory", f"rank of block {first} or {last}")
    low = parts.end - parts.unary.size - 4 * parts.low.size
    unary = parts.end - parts.unary.size
    spans = [
        (low + ranks[0] * k // 8, low + -(-ranks[1] * k // 8)),
        (unary + first * BLOCK // 8, min(unary + last * BLOCK // 8, parts.end)),
    ]
    return FoundBlocks(Blocks(first, last, base.size), ranks, spans)


class Rice(IndexCodec):
    """The index codec RICE."""

    id = IndexId.RICE
    name = "RICE"

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        gaps = gaps_of(positions)
        k = best_k(gaps)
        unary_bits = int((gaps >> k).sum()) + gaps.size
        return section_size(gaps.size, math.prod(shape), k, unary_bits)

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether head, one u32 word and slack fit; the head tells the rest."""
        return size >= registry.RICE_HEAD.size + registry.SLACK

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        gaps = gaps_of(positions)
        k = best_k(gaps)
        low = gaps & ((1 << k) - 1)
        ones = np.cumsum((gaps >> k) + 1) - 1
        unary_bits = int(ones[-1]) + 1
        word = registry.word_size(math.prod(shape))
        return b"".join(
            (
                registry.RICE_HEAD.pack(k, unary_bits),
                _directory(ones, np.cumsum(low), k, 0, unary_bits).astype(f"<u{word}").tobytes(),
                pack_fields(low, k) if k else b"",
                pack_bitmap(ones, unary_bits),
                SLACK,
            )
        )

    def lead(self, data: Bytes, nnz: int, numel: int) -> int:
        _, unary_bits = registry.RICE_HEAD.unpack_from(data.data)
        return small_lead(data) or registry.RICE_HEAD.size + -(-unary_bits // BLOCK) * 2 * registry.word_size(numel)

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """Decodes several blocks at once: the formula of a block holds for any run of blocks."""
        numel = math.prod(shape)
        parts = RiceParts.of(data, nnz, numel)
        last = parts.unary_bits - 1
        tail = find_ones(parts.unary[last // 8 :]) if parts.unary_bits else np.zeros(0, np.int64)
        padding = int(np.count_nonzero(tail > last % 8))
        found = count_ones(parts.unary) - padding
        if found != nnz or last % 8 not in tail:
            raise FormatError("bad_index", f"{found} ones for {nnz} nonzeros, or zeros behind the last")
        # Shifting could overflow int64: the zeros alone must not carry a position out of the tensor.
        if (parts.unary_bits - nnz) > (numel >> parts.k):
            raise FormatError("position_range", f"the quotients sum to {parts.unary_bits - nnz}")
        before, directory_fits = _Before(), True
        for start, stop in ranges(parts.unary_bits):
            ones = find_ones(parts.unary[start // 8 : -(-stop // 8)]) + start
            ones = ones[: np.searchsorted(ones, stop)]
            count = np.arange(before.rank, before.rank + ones.size, dtype=np.int64)
            low_sum = before.low_sum + np.cumsum(parts.low_bits(before.rank, before.rank + ones.size))
            positions: Positions = ((ones - count) << parts.k) + low_sum + count
            check_positions(positions, numel)
            expected = _directory(ones, low_sum, parts.k, start, stop, before)
            directory_fits &= np.array_equal(parts.directory[start // BLOCK : -(-stop // BLOCK)], expected)
            if ones.size:
                before = _Before(before.rank + ones.size, int(low_sum[-1]))
            yield positions
        if not directory_fits:
            raise FormatError("bad_directory", "base or rank of a block")
        unused_low = nnz * parts.k % 32
        if padding or (unused_low and parts.low[-1] >> unused_low):
            raise FormatError("padding_not_zero", "unused bits of low or unary")
        check_zero(data, parts.end)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Decodes only the blocks that can hold the range."""
        numel = math.prod(shape)
        parts = RiceParts.of(data, nnz, numel)
        base, rank = _checked_directory(parts.directory, numel)
        first, last = _find_blocks(base, start, stop)
        begin = first * BLOCK
        ones = find_ones(parts.unary[begin // 8 : last * BLOCK // 8])
        rank0 = int(rank[first])
        end = rank0 + ones.size
        if end != (int(rank[last]) if last < rank.size else nnz) or end > nnz:
            raise FormatError("bad_directory", f"rank of block {first} or {last}")
        count = np.arange(ones.size, dtype=np.int64)
        if ones.size and int(ones[-1] - count[-1]) > (numel >> parts.k):
            raise FormatError("position_range", f"quotients of block {first} and on")
        low_sum = np.cumsum(parts.low_bits(rank0, end))
        positions: Positions = base[first] + ((ones - count) << parts.k) + low_sum + count
        check_positions(positions, numel)
        # Entries behind the first one have to follow from it, also that of the next block.
        before = _Before(rank0, int(base[first]) - rank0 - ((begin - rank0) << parts.k))
        edge = min(last * BLOCK + 1, parts.unary_bits)
        expected = _directory(ones + begin, low_sum + before.low_sum, parts.k, begin, edge, before)
        if not np.array_equal(parts.directory[first : first + len(expected)], expected):
            raise FormatError("bad_directory", f"base or rank of a block from {first} to {last}")
        skip, stop_at = np.searchsorted(positions, [start, stop])
        return rank0 + int(skip), positions[skip:stop_at]
