"""ULP: shifts, as signs and a list of those beyond 1, in blocks of 8,192 that decode independently (FORMAT.md, 5.1).

Nine shifts of ten in a training step are +1 or -1.  A block lists the others: their gaps, Rice coded, and their
magnitudes, Exp-Golomb coded, each as all unary parts and then all fields.  So no step depends on the one before it
except through prefix sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import SLACK, Bytes, ValueCodec, check_zero, part
from shiradelta.format.codecs.packing import find_ones, pack_bitmap
from shiradelta.format.codecs.rice import best_k
from shiradelta.format.registry import ValueId
from shiradelta.util.arrays import ranges

BLOCK = registry.ULP_BLOCK
#: The largest k, with which a gap has no unary part; the largest j; the most bits of a magnitude's field.
_MOST_K, _MOST_J, _MOST_WIDTH = 13, 62, 63
_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)

Unsigned = npt.NDArray[np.uint64]


def _bit_length(numbers: Unsigned) -> Positions:
    """The bits of each number; exact, unlike a logarithm."""
    return np.searchsorted(_POWERS, numbers, side="right")


class _Runs(NamedTuple):
    """Numbers in runs, one run a block."""

    counts: Positions

    def sums(self, numbers: Positions) -> Positions:
        """The sum of each run, which is not empty."""
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


@dataclass(frozen=True)
class _UlpParts:
    """A section taken apart; head, size and directory are checked."""

    k: int
    j: int
    bits: int  # of the stream
    directory: Positions  # [blocks + 1, 2]: first bit, number of listed shifts before; the last row is the end
    signs: Bytes
    stream: Bytes  # with the slack
    end: int  # where the slack starts

    @classmethod
    def of(cls, data: Bytes, nnz: int) -> _UlpParts:
        """Raises FormatError where head, size and directory contradict each other."""
        k, j, bits, listed = registry.ULP_HEAD.unpack_from(data.data)
        if k > _MOST_K or j > _MOST_J or data[2:8].any():
            raise FormatError("bad_value", f"k is {k}, j is {j}, or the bytes behind them are not zero")
        blocks, word = -(-nnz // BLOCK), registry.word_size(max(bits, listed))
        head = registry.ULP_HEAD.size
        signs = head + blocks * 2 * word
        stream = signs + 4 * -(-nnz // 32)
        end = stream + 4 * -(-bits // 32)
        if end + registry.SLACK != data.size:
            raise FormatError("bad_size", f"{data.size} bytes for {bits} bits of {nnz} shifts")
        rows = part(data, head, blocks * 2, f"<u{word}").reshape(blocks, 2)
        if listed > nnz or rows[0].any() or np.any(rows[1:] < rows[:-1]) or np.any(rows[-1] > (bits, listed)):
            raise FormatError("bad_directory", "what is before a block does not increase from 0 to all")
        directory = np.concatenate((rows.astype(np.int64), [[bits, listed]]))
        return cls(k, j, bits, directory, data[signs:stream], data[stream:], end)

    def magnitudes(self, first: int, last: int, nnz: int, most: int) -> Positions:
        """int64, of the shifts in blocks first to last - 1.

        Args:
            first: a block.
            last: a later one.
            nnz: all shifts.
            most: the largest magnitude.

        Raises:
            FormatError: the stream of a block is damaged.
        """
        result = np.ones(min(last * BLOCK, nnz) - first * BLOCK, np.int64)
        at, end = self.directory[first:last, 0], self.directory[first + 1 : last + 1, 0]
        counts = np.diff(self.directory[first : last + 1, 1])
        lists = np.flatnonzero(counts)
        if np.any(at[counts == 0] != end[counts == 0]):
            raise FormatError("bad_value", "bits of a block that lists no shifts")
        if not lists.size:
            return result
        at, end, runs = at[lists], end[lists], _Runs(counts[lists])
        skipped = int(at[0]) & ~7
        ones = find_ones(self.stream[skipped // 8 : -(-int(end[-1]) // 8)]) + skipped
        quotients, at = _unary(ones, at, end, runs)
        low = at
        at = at + runs.counts * self.k
        zeros, at = _unary(ones, at, end, runs)
        widths = zeros + self.j
        if np.any(widths > _MOST_WIDTH) or np.any(at + runs.sums(widths) != end):
            raise FormatError("bad_value", "magnitudes do not end where their block does")
        gaps = (quotients << self.k) + self._fields(
            runs.spread(low) + runs.within * self.k, np.full(quotients.size, self.k)
        ).astype(np.int64)
        beyond = self._fields(runs.spread(at) + runs.up_to(widths) - widths, widths)
        beyond += _POWERS[widths] - _POWERS[self.j]
        ranks = runs.up_to(gaps + 1) - 1 + runs.spread(lists * BLOCK)
        if np.any(ranks >= np.minimum(runs.spread((lists + 1) * BLOCK), result.size)):
            raise FormatError("bad_value", "a shift is listed outside of its block")
        if np.any(beyond > np.uint64(most - 2)):
            raise FormatError("bad_value", "a shift does not fit the elements")
        result[ranks] = beyond.astype(np.int64) + 2
        return result

    def _fields(self, at: Positions, widths: Positions) -> Unsigned:
        """Fields of up to 63 bits.  Nine bytes are read for each; the slack follows the last one."""
        # An empty field may start where the stream ends, at the slack.
        byte, low = np.minimum(at >> 3, self.stream.size - 9), (at & 7).astype(np.uint64)
        nine = self.stream[byte[:, None] + np.arange(9)]
        words = np.ascontiguousarray(nine[:, :8]).view("<u8")[:, 0]
        # A shift by 64 bits is not defined, so the ninth byte moves in two.
        words = (words >> low) | ((nine[:, 8].astype(np.uint64) << (np.uint64(63) - low)) << np.uint64(1))
        fields: Unsigned = words & (_POWERS[widths] - np.uint64(1))
        return fields


def _unary(ones: Positions, at: Positions, end: Positions, runs: _Runs) -> tuple[Positions, Positions]:
    """(the zeros before each of a block's first ones from `at` on, the bit behind the last of these ones).

    Raises:
        FormatError: a block ends before.
    """
    slots = runs.spread(np.searchsorted(ones, at)) + runs.within
    if slots[-1] >= ones.size or np.any(ones[slots] >= runs.spread(end)):
        raise FormatError("bad_value", "a block of shifts ends within its unary bits")
    found = ones[slots]
    before = np.where(runs.within == 0, runs.spread(at) - 1, np.append(-1, found[:-1]))
    return found - before - 1, found[np.cumsum(runs.counts) - 1] + 1


def _best_j(beyond: Unsigned, most: int) -> int:
    """The smallest j that makes the magnitudes' bits fewest."""
    # A magnitude takes 2 z + 1 + j bits, and z + j + 1 is the length of beyond + 2^j.
    costs = [2 * int((_bit_length(beyond + _POWERS[j]) - 1 - j).sum()) + j * beyond.size for j in range(most + 1)]
    return int(np.argmin(costs))


class Ulp(ValueCodec):
    """The value codec ULP."""

    id = ValueId.ULP
    name = "ULP"
    option = None
    adds = False
    shifts = True
    minor = 1

    def size(self, nnz: int, size: int) -> int:
        return registry.ULP_HEAD.size + 8 * -(-nnz // BLOCK) + 4 * -(-nnz // 32) + registry.SLACK

    def size_is_possible(self, section: int, nnz: int, size: int) -> bool:
        """Whether everything but the stream fits; the head tells the rest."""
        return section >= self.size(nnz, size)

    def encode(self, values: Array) -> bytes:
        size = values.itemsize
        shifts = values.view(f"<i{size}").astype(np.int64)
        magnitudes, most = np.abs(shifts), (1 << (8 * size - 1)) - 1
        if np.any(magnitudes < 1) or np.any(magnitudes > most):
            raise DeltaError(f"a shift is 0, or beyond {most}: it does not fit the codec")
        k, j, stream, directory = _encode(np.flatnonzero(magnitudes > 1), magnitudes, 8 * size - 2)
        bits, listed = directory[-1].tolist()
        return b"".join(
            (
                registry.ULP_HEAD.pack(k, j, bits, listed),
                directory[:-1].astype(f"<u{registry.word_size(max(bits, listed))}").tobytes(),
                pack_bitmap(np.flatnonzero(shifts < 0), values.size),
                np.packbits(stream, bitorder="little").tobytes(),
                SLACK,
            )
        )

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        return self._decode(_UlpParts.of(data, nnz), nnz, size, start, stop)

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        parts = _UlpParts.of(data, nnz)
        for start, stop in ranges(nnz):
            self._decode(parts, nnz, size, start, stop)
        for bitmap, bits in (parts.signs, nnz), (parts.stream[: -registry.SLACK], parts.bits):
            if bits % 32 and int.from_bytes(bitmap[-4:].tobytes(), "little") >> bits % 32:
                raise FormatError("padding_not_zero", "unused bits of signs or stream")
        check_zero(data, parts.end)

    def _decode(self, parts: _UlpParts, nnz: int, size: int, start: int, stop: int) -> Array:
        if start == stop:
            return np.zeros(0, f"<u{size}")
        first, last = start // BLOCK, -(-stop // BLOCK)
        found = parts.magnitudes(first, last, nnz, (1 << (8 * size - 1)) - 1)[start - first * BLOCK :][: stop - start]
        minus = np.unpackbits(parts.signs[start // 8 : -(-stop // 8)], bitorder="little")
        minus = minus[start % 8 :][: stop - start]
        return np.where(minus, -found, found).astype(f"<i{size}").view(f"<u{size}")


def _encode(ranks: Positions, magnitudes: Positions, most_j: int) -> tuple[int, int, npt.NDArray[np.uint8], Positions]:
    """(k, j, the stream's bits, the directory with the end as its last row) of the shifts to list."""
    blocks = -(-magnitudes.size // BLOCK)
    listed = np.bincount(ranks // BLOCK, minlength=blocks)
    beyond = magnitudes[ranks].astype(np.uint64) - np.uint64(2)
    gaps = ranks - np.maximum(np.append(-1, ranks[:-1])[: ranks.size], ranks // BLOCK * BLOCK - 1) - 1
    k, j = best_k(gaps), _best_j(beyond, most_j)
    widths = _bit_length(beyond + _POWERS[j]) - 1
    lists, sizes = np.flatnonzero(listed), np.zeros(blocks, np.int64)
    if not lists.size:
        return k, j, np.zeros(0, np.uint8), np.zeros((blocks + 1, 2), np.int64)
    runs, gap_unary, unary = _Runs(listed[lists]), (gaps >> k) + 1, widths - j + 1
    parts = runs.sums(gap_unary), runs.counts * k, runs.sums(unary), runs.sums(widths)
    sizes[lists] = sum(parts)
    starts = np.append(0, np.cumsum(sizes))
    gap_at, low_at, unary_at, field_at = starts[lists] + np.cumsum([np.zeros_like(lists), *parts[:3]], axis=0)
    stream = np.zeros(-(-starts[-1] // 32) * 32, np.uint8)
    stream[runs.spread(gap_at) + runs.up_to(gap_unary) - 1] = 1
    stream[runs.spread(unary_at) + runs.up_to(unary) - 1] = 1
    low = runs.spread(low_at) + runs.within * k
    for bit in range(k):
        stream[low + bit] = gaps >> bit & 1
    fields, field = beyond + _POWERS[j] - _POWERS[widths], runs.spread(field_at) + runs.up_to(widths) - widths
    for bit in range(int(widths.max())):
        has = widths > bit
        stream[field[has] + bit] = fields[has] >> np.uint64(bit) & np.uint64(1)
    return k, j, stream, np.stack((starts, np.append(0, np.cumsum(listed))), axis=1)
