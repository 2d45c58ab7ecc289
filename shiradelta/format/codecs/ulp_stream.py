"""The stream of shifts beyond 1: gaps, Rice coded, and magnitudes, Exp-Golomb coded (FORMAT.md, 5.1 and 5.2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.packing import find_ones, put_fields
from shiradelta.util.arrays import exclusive, ranges, within

#: The largest k, with which a gap has no unary part; the largest j; the most bits of a magnitude's field.
MOST_K, MOST_J, MOST_WIDTH = 13, 62, 63
#: About how many shifts are written at a time.
_AT_A_TIME = 1 << 15
#: Numbers below this are counted in a table.
_COUNTED = 1 << 20
_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)

Unsigned = npt.NDArray[np.uint64]


class BlockRuns(NamedTuple):
    """Numbers in runs, which are not empty."""

    counts: Positions

    def sums(self, numbers: Positions) -> Positions:
        """The sum of each run."""
        return np.add.reduceat(numbers, self.starts)

    def up_to(self, numbers: Positions) -> Positions:
        """Running sums within each run, each with the number itself."""
        total = np.cumsum(numbers)
        return total - np.repeat(total[self.starts] - numbers[self.starts], self.counts)

    def spread(self, numbers: Positions) -> Positions:
        """A number of each run for all of its members."""
        return np.repeat(numbers, self.counts)

    @property
    def starts(self) -> Positions:
        """Where runs start."""
        return exclusive(self.counts)

    @property
    def within(self) -> Positions:
        """0, 1, ... in each run."""
        return within(self.counts)


class Listed(NamedTuple):
    """The shifts that blocks list, block after block.

    Attributes:
        gaps: of each, how many shifts lie between it and the one before.
        beyond: by how much its magnitude is above 2.
    """

    gaps: Positions
    beyond: Unsigned


def read_listed(stream: Bytes, at: Positions, end: Positions, runs: BlockRuns, k: Positions, j: Positions) -> Listed:
    """Reads the streams of blocks, one after the other.

    Args:
        stream: all of them, and the slack.
        at: the first bit of each block.
        end: the bit behind each block.
        runs: how many shifts each of them lists.
        k: of each shift.
        j: of each shift.

    Raises:
        FormatError: a block has other bits than its parts take.
    """
    skipped = int(at[0]) & ~7
    ones = find_ones(stream[skipped // 8 : -(-int(end[-1]) // 8)]) + skipped
    quotients, low = _unary(ones, at, end, runs)
    zeros, fields = _unary(ones, low + runs.sums(k), end, runs)
    widths = zeros + j
    if np.any(widths > MOST_WIDTH) or np.any(fields + runs.sums(widths) != end):
        raise FormatError("bad_value", "magnitudes do not end where their block does")
    gaps = (quotients << k) + _fields(stream, runs.spread(low) + runs.up_to(k) - k, k).astype(np.int64)
    beyond = _fields(stream, runs.spread(fields) + runs.up_to(widths) - widths, widths)
    beyond += _POWERS[widths] - _POWERS[j]
    return Listed(gaps, beyond)


def write_listed(listed: Listed, runs: BlockRuns, k: Positions, j: Positions) -> tuple[bytes, Positions]:
    """(the streams of blocks in whole u32 words, the bits of each block); see `read_listed`."""
    written, sizes, bits = [], [], 0
    edges = np.append(0, np.cumsum(runs.counts)).tolist()
    # Some blocks at a time, so that what is made of them stays in a core's cache.
    for first, last in ranges(runs.counts.size, max(_AT_A_TIME * runs.counts.size // edges[-1], 1)):
        start, stop = edges[first], edges[last]
        some = Listed(listed.gaps[start:stop], listed.beyond[start:stop])
        words, of_blocks = _write(some, BlockRuns(runs.counts[first:last]), k[start:stop], j[start:stop], bits % 64)
        written.append((bits // 64, words))
        sizes.append(of_blocks)
        bits += int(of_blocks.sum())
    stream = np.zeros(bits // 64 + 2, np.uint64)
    for word, words in written:
        stream[word : word + words.size] |= words
    return stream.astype("<u8", copy=False).tobytes()[: 4 * -(-bits // 32)], np.concatenate(sizes)


def _write(listed: Listed, runs: BlockRuns, k: Positions, j: Positions, at: int) -> tuple[Unsigned, Positions]:
    """(words of the streams of blocks from a bit on, the bits of each block)."""
    gaps, beyond = listed
    widths = _bit_length(beyond + _POWERS[j]) - 1
    gap_unary, unary = (gaps >> k) + 1, widths - j + 1
    parts = runs.sums(gap_unary), runs.sums(k), runs.sums(unary), runs.sums(widths)
    sizes: Positions = np.sum(parts, axis=0)
    starts = np.cumsum(sizes) - sizes + at
    gap_at, low_at, unary_at, field_at = starts + np.cumsum([np.zeros_like(starts), *parts[:3]], axis=0)
    words, ones = np.zeros((at + int(sizes.sum())) // 64 + 2, np.uint64), np.ones(k.size, np.uint64)
    low, fields = gaps.astype(np.uint64) & (_POWERS[k] - np.uint64(1)), beyond + _POWERS[j] - _POWERS[widths]
    put_fields(words, runs.spread(gap_at) + runs.up_to(gap_unary) - 1, ones)
    put_fields(words, runs.spread(low_at) + runs.up_to(k) - k, low)
    put_fields(words, runs.spread(unary_at) + runs.up_to(unary) - 1, ones)
    put_fields(words, runs.spread(field_at) + runs.up_to(widths) - widths, fields)
    return words, sizes


def best_j(beyond: Unsigned, most: int) -> int:
    """The smallest j that makes the magnitudes' bits fewest."""
    different, counts = counted(beyond)
    return int(np.argmin([_bits_of(different, counts, j) for j in range(most + 1)]))


def magnitude_bits(beyond: Unsigned, j: int) -> int:
    """Bits of the magnitudes."""
    return _bits_of(*counted(beyond), j)


def counted(numbers: Unsigned) -> tuple[Unsigned, Positions]:
    """(the different numbers, how many there are of each); few numbers differ."""
    if numbers.size and int(numbers.max()) < _COUNTED:  # much faster than sorting
        counts = np.bincount(numbers.astype(np.int64))
        different = np.flatnonzero(counts)
        return different.astype(np.uint64), counts[different]
    return np.unique(numbers, return_counts=True)


def _bits_of(beyond: Unsigned, counts: Positions, j: int) -> int:
    # A magnitude takes 2 z + 1 + j bits, and z + j + 1 is the length of beyond + 2^j.
    zeros = _bit_length(beyond + _POWERS[j]) - 1 - j
    return int((2 * zeros + 1 + j) @ counts)


def _bit_length(numbers: Unsigned) -> Positions:
    """The bits of each number; exact, unlike a logarithm."""
    if numbers.size and int(numbers.max()) >= _POWERS[53]:  # which float64 rounds
        return np.searchsorted(_POWERS, numbers, side="right")
    _, lengths = np.frexp(numbers.astype(np.float64))
    return lengths.astype(np.int64)


def _unary(ones: Positions, at: Positions, end: Positions, runs: BlockRuns) -> tuple[Positions, Positions]:
    """(the zeros before each of a block's first ones from `at` on, the bit behind the last of these ones).

    Raises:
        FormatError: a block ends before.
    """
    slots = runs.spread(np.searchsorted(ones, at)) + runs.within
    # A damaged block may begin anywhere, so its slots may be beyond those of the blocks behind it.
    if slots.max() >= ones.size or np.any(ones[slots] >= runs.spread(end)):
        raise FormatError("bad_value", "a block of shifts ends within its unary bits")
    found = ones[slots]
    before = np.where(runs.within == 0, runs.spread(at) - 1, np.append(-1, found[:-1]))
    return found - before - 1, found[np.cumsum(runs.counts) - 1] + 1


def _fields(stream: Bytes, at: Positions, widths: Positions) -> Unsigned:
    """Fields of up to 63 bits.  Nine bytes are read for each; the slack follows the last one."""
    # An empty field may start where the stream ends, at the slack.
    byte, low = np.minimum(at >> 3, stream.size - 9), (at & 7).astype(np.uint64)
    nine = stream[byte[:, None] + np.arange(9)]
    words = np.ascontiguousarray(nine[:, :8]).view("<u8")[:, 0]
    # A shift by 64 bits is not defined, so the ninth byte moves in two.
    words = (words >> low) | ((nine[:, 8].astype(np.uint64) << (np.uint64(63) - low)) << np.uint64(1))
    fields: Unsigned = words & (_POWERS[widths] - np.uint64(1))
    return fields
