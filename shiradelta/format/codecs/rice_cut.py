"""Cuts a RICE section: neighbours in one tensor that are neighbours in another one keep their bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes
from shiradelta.format.codecs.packing import field_words, find_ones
from shiradelta.format.codecs.rice import BLOCK, RiceParts

_Words = npt.NDArray[np.uint64]
_WORD = 64
#: Byte -> how many of its bits are one.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def cut(section: Bytes, nnz: int, numel: int, rank: int, positions: Positions, numel_there: int) -> bytes | None:
    """The section of consecutive nonzeros, moved into another tensor.

    It has the k of the whole one, so a first position far from 0 takes many zeros: None if more than a bit a nonzero.

    Args:
        section: the whole section, which has been checked.
        nnz: its nonzeros.
        numel: elements of its tensor.
        rank: the first one's rank there.
        positions: at least one, in the other tensor; their distances are those of the section.
        numel_there: elements of the other tensor.
    """
    parts, count = RiceParts.of(section, nnz, numel), positions.size
    k = parts.k
    if int(positions[0]) >> k > max(count, BLOCK):
        return None
    start, last = (_bit_of(parts, one) for one in (rank, rank + count - 1))
    quotient, low = int(positions[0]) >> k, int(positions[0]) & ((1 << k) - 1)  # of the first gap, which is another
    unary_bits = quotient + 1 + last - start
    blocks = -(-unary_bits // BLOCK)
    unary = _moved(parts.unary, start, last + 1, quotient, blocks * BLOCK // _WORD)
    lows = _moved(parts.low.view(np.uint8), rank * k, (rank + count) * k, 0, -(-count * k // _WORD))
    if k:
        lows[0] = lows[0] & ~np.uint64((1 << k) - 1) | np.uint64(low)
    word = registry.word_size(numel_there)
    return b"".join(
        (
            registry.RICE_HEAD.pack(k, unary_bits),
            _directory(unary, positions, k, blocks).astype(f"<u{word}").tobytes(),
            lows.view(np.uint8)[: 4 * field_words(count, k)].data,
            unary.view(np.uint8)[: 4 * -(-unary_bits // 32)].data,
            SLACK,
        )
    )


def _bit_of(parts: RiceParts, rank: int) -> int:
    """The bit of the unary part that stands for the nonzero of a rank."""
    ranks = parts.directory[:, 1]
    block = int(np.searchsorted(ranks, rank, side="right")) - 1
    ones = find_ones(parts.unary[block * BLOCK // 8 : (block + 1) * BLOCK // 8])
    return block * BLOCK + int(ones[rank - int(ranks[block])])


def _moved(data: Bytes, start: int, stop: int, at: int, size: int) -> _Words:
    """Bits from start to stop - 1, from bit `at` on in `size` words that are 0 elsewhere."""
    first, last = start // _WORD, -(-stop // _WORD)
    words = np.zeros(last - first + 1, np.uint64)  # the last one takes what is shifted out of the others
    taken = data[first * _WORD // 8 : last * _WORD // 8]
    words.view(np.uint8)[: taken.size] = taken
    if stop > start:
        words[0] &= np.uint64((1 << _WORD) - (1 << start % _WORD))
        words[-2] &= np.uint64((1 << _WORD - -stop % _WORD) - 1)
    word, shift = divmod(at - start % _WORD, _WORD)
    if shift:
        shifted = words << np.uint64(shift)
        shifted[1:] |= words[:-1] >> np.uint64(_WORD - shift)
        words = shifted
    result = np.zeros(size, np.uint64)
    skip = max(-word, 0)  # a word before the first, which has no bits then
    words = words[skip : skip + size - max(word, 0)]
    result[max(word, 0) : max(word, 0) + words.size] = words
    return result


def _directory(unary: _Words, positions: Positions, k: int, blocks: int) -> Positions:
    """The base and the rank of each block, int64 [blocks, 2]."""
    ones = _ONES[unary.view(np.uint8)].reshape(blocks, -1).sum(axis=1, dtype=np.int64)
    rank = np.cumsum(ones) - ones
    edges = np.arange(blocks, dtype=np.int64) * BLOCK
    # The last one before each edge: its position, and its bit, which tell what the zeros behind it add.
    some = np.flatnonzero(unary)
    before = np.maximum(np.searchsorted(some, edges // _WORD) - 1, 0)
    bit = some[before] * _WORD + _highest(unary[some[before]])
    follows = rank > 0
    position = np.where(follows, positions[np.maximum(rank - 1, 0)] + 1, 0)
    zeros = np.where(follows, edges - bit - 1, edges)
    return np.stack([position + (zeros << k), rank], axis=1)


def _highest(words: _Words) -> Positions:
    """The highest bit of words that are not 0."""
    high = words >> np.uint64(32)
    halves = np.where(high > 0, high, words).astype(np.float64)  # exact: less than 2^32
    return np.frexp(halves)[1].astype(np.int64) - 1 + 32 * (high > 0)
