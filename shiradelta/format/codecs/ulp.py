"""ULP: shifts, as signs and a list of those beyond 1, in blocks of 8,192 that decode independently (FORMAT.md, 5.1).

Nine shifts of ten in a training step are +1 or -1.  A block lists the others: their gaps, Rice coded, and their
magnitudes, Exp-Golomb coded, each as all unary parts and then all fields.  So no step depends on the one before it
except through prefix sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import SLACK, Bytes, ValueCodec, check_zero, part, small_lead
from shiradelta.format.codecs.packing import has_unused_bits, pack_flags
from shiradelta.format.codecs.rice import best_k
from shiradelta.format.codecs.ulp_stream import (
    MOST_J,
    MOST_K,
    BlockRuns,
    Listed,
    best_j,
    magnitude_bits,
    read_listed,
    write_listed,
)
from shiradelta.format.registry import ValueId
from shiradelta.util.arrays import WINDOW, ranges

BLOCK = registry.ULP_BLOCK


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
        if k > MOST_K or j > MOST_J or data[2:8].any():
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
        runs = BlockRuns(counts[lists])
        k, j = (np.full(int(runs.counts.sum()), each) for each in (self.k, self.j))
        gaps, beyond = read_listed(self.stream, at[lists], end[lists], runs, k, j)
        ranks = runs.up_to(gaps + 1) - 1 + runs.spread(lists * BLOCK)
        if np.any(ranks >= np.minimum(runs.spread((lists + 1) * BLOCK), result.size)):
            raise FormatError("bad_value", "a shift is listed outside of its block")
        if np.any(beyond > np.uint64(most - 2)):
            raise FormatError("bad_value", "a shift does not fit the elements")
        result[ranks] = beyond.astype(np.int64) + 2
        return result


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

    def lead(self, data: Bytes, nnz: int) -> int:
        parts = _UlpParts.of(data, nnz)
        return small_lead(data) or data.size - parts.signs.size - parts.stream.size

    def encode(self, values: Array) -> bytes:
        shifts = _signed(values)
        listing = _Listing.of(shifts, values.itemsize)
        stream, directory = listing.written()
        bits, listed = directory[-1].tolist()
        return b"".join(
            (
                registry.ULP_HEAD.pack(listing.k, listing.j, bits, listed),
                directory[:-1].astype(f"<u{registry.word_size(max(bits, listed))}").tobytes(),
                pack_flags(shifts < 0),
                stream,
                SLACK,
            )
        )

    def encoded_size(self, values: Array, enough: int = 0) -> int:
        """Bytes of the section of these values, without making it; or a bound of them that is `enough` at most."""
        size, nnz = values.itemsize, values.size
        # A gap takes 14 bits at most with the largest k, and a magnitude two for each of its own with j = 0.
        beyond = sum(int(np.count_nonzero(some)) for some in _beyond_1(_signed(values)))
        most = self.size(nnz, size) + 8 * -(-nnz // BLOCK) + 4 * -(-(14 + 16 * size) * beyond // 32)
        if most <= enough:
            return most
        listing = _Listing.of(_signed(values), size)
        bits, listed = listing.bits, listing.listed.gaps.size
        least = self.size(nnz, size) - 8 * listing.counts.size
        return least + 2 * registry.word_size(max(bits, listed)) * listing.counts.size + 4 * -(-bits // 32)

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        return self._decode(_UlpParts.of(data, nnz), nnz, size, start, stop)

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        parts = _UlpParts.of(data, nnz)
        for start, stop in ranges(nnz):
            self._decode(parts, nnz, size, start, stop)
        for bitmap, bits in (parts.signs, nnz), (parts.stream[: -registry.SLACK], parts.bits):
            if has_unused_bits(bitmap, bits):
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


def _signed(values: Array) -> Array:
    return values.view(f"<i{values.itemsize}")


def _beyond_1(shifts: Array) -> Iterator[npt.NDArray[np.bool_]]:
    """Whether each of the signed shifts is another one than 1 and -1, in windows that stay in a core's cache."""
    return (np.abs(shifts[start:stop]) != 1 for start, stop in ranges(shifts.size))


@dataclass(frozen=True)
class _Listing:
    """The shifts to list, and how."""

    listed: Listed
    counts: Positions  # of each block
    k: int
    j: int

    @classmethod
    def of(cls, shifts: Array, size: int) -> _Listing:
        """Those beyond 1 among signed shifts of elements of so many bytes.

        Raises:
            DeltaError: a shift does not fit.
        """
        found = [np.flatnonzero(some) + number * WINDOW for number, some in enumerate(_beyond_1(shifts))]
        ranks = np.concatenate(found) if found else np.zeros(0, np.int64)
        magnitudes, most = np.abs(shifts[ranks].astype(np.int64)), (1 << (8 * size - 1)) - 1
        # The magnitude of the smallest 64-bit integer is itself.
        if np.any(magnitudes < 1) or np.any(magnitudes > most):
            raise DeltaError(f"a shift is 0, or beyond {most}: it does not fit the codec")
        beyond = magnitudes.astype(np.uint64) - np.uint64(2)
        starts = np.arange(0, shifts.size, BLOCK)
        firsts = np.searchsorted(ranks, starts)
        counts = np.diff(firsts, append=ranks.size)
        gaps, some = np.diff(ranks, prepend=-1) - 1, counts > 0
        gaps[firsts[some]] = ranks[firsts[some]] - starts[some]
        return cls(Listed(gaps, beyond), counts, best_k(gaps), best_j(beyond, 8 * size - 2))

    @property
    def bits(self) -> int:
        """Bits of the stream."""
        gaps, beyond = self.listed
        return int((gaps >> self.k).sum()) + (1 + self.k) * gaps.size + magnitude_bits(beyond, self.j)

    def written(self) -> tuple[bytes, Positions]:
        """(the stream, the directory with the end as its last row)."""
        lists, sizes, stream = np.flatnonzero(self.counts), np.zeros(self.counts.size, np.int64), b""
        if lists.size:
            k, j = (np.full(self.listed.gaps.size, each) for each in (self.k, self.j))
            stream, sizes[lists] = write_listed(self.listed, BlockRuns(self.counts[lists]), k, j)
        ends = [np.append(0, np.cumsum(each)) for each in (sizes, self.counts)]
        return stream, np.stack(ends, axis=1)
