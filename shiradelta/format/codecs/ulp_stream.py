"""The stream of shifts beyond 1: gaps, Rice coded, and magnitudes, Exp-Golomb coded (FORMAT.md, 5.1 and 5.2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.packing import find_ones

#: The largest k, with which a gap has no unary part; the largest j; the most bits of a magnitude's field.
MOST_K, MOST_J, MOST_WIDTH = 13, 62, 63
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
        return np.cumsum(self.counts) - self.counts

    @property
    def within(self) -> Positions:
        """0, 1, ... in each run."""
        return np.arange(self.counts.sum()) - self.spread(self.starts)


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
    gaps, beyond = listed
    widths = _bit_length(beyond + _POWERS[j]) - 1
    gap_unary, unary = (gaps >> k) + 1, widths - j + 1
    parts = runs.sums(gap_unary), runs.sums(k), runs.sums(unary), runs.sums(widths)
    sizes: Positions = np.sum(parts, axis=0)
    starts = np.cumsum(sizes) - sizes
    gap_at, low_at, unary_at, field_at = starts + np.cumsum([np.zeros_like(starts), *parts[:3]], axis=0)
    stream = np.zeros(-(-int(sizes.sum()) // 32) * 32, np.uint8)
    stream[runs.spread(gap_at) + runs.up_to(gap_unary) - 1] = 1
    stream[runs.spread(unary_at) + runs.up_to(unary) - 1] = 1
    low = runs.spread(low_at) + runs.up_to(k) - k
    for bit in range(int(k.max())):
        has = k > bit
        stream[low[has] + bit] = gaps[has] >> bit & 1
    fields, field = beyond + _POWERS[j] - _POWERS[widths], runs.spread(field_at) + runs.up_to(widths) - widths
    for bit in range(int(widths.max())):
        has = widths > bit
        stream[field[has] + bit] = fields[has] >> np.uint64(bit) & np.uint64(1)
    return np.packbits(stream, bitorder="little").tobytes(), sizes


def best_j(beyond: Unsigned, most: int) -> int:
    """The smallest j that makes the magnitudes' bits fewest."""
    # A magnitude takes 2 z + 1 + j bits, and z + j + 1 is the length of beyond + 2^j.  Few of them differ.
    different, counts = np.unique(beyond, return_counts=True)
    zeros = [int((_bit_length(different + _POWERS[j]) - 1 - j) @ counts) for j in range(most + 1)]
    return int(np.argmin([2 * z + j * beyond.size for j, z in enumerate(zeros)]))


def _bit_length(numbers: Unsigned) -> Positions:
    """The bits of each number; exact, unlike a logarithm."""
    return np.searchsorted(_POWERS, numbers, side="right")


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
