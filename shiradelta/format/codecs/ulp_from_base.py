"""ULP_FROM_BASE: shifts as ULP has them, listed by classes of the base's elements (FORMAT.md, 5.2).

A step of training moves weights by about the same amount, so a small weight moves by more representable numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import SLACK, Bytes, ValueCodec, check_zero, padded, part
from shiradelta.format.codecs.base_classes import KEYS, Keys, round_step, thresholds
from shiradelta.format.codecs.from_base_classes import keys_of
from shiradelta.format.codecs.packing import has_unused_bits, pack_flags
from shiradelta.format.codecs.rice import best_k
from shiradelta.format.codecs.tiles import PartsReader, Small, fields
from shiradelta.format.codecs.ulp_stream import (
    MOST_J,
    MOST_K,
    BlockRuns,
    Listed,
    best_j,
    counted,
    read_listed,
    write_listed,
)
from shiradelta.format.registry import ValueId

BLOCK = registry.ULP_BLOCK
HEAD = registry.ULP_FROM_BASE_HEAD
#: How many j are weighed where classes are chosen.
_JS = 14
#: The most bits of a count: a block may list all of its shifts.
_MOST_COUNT = 14


@dataclass(frozen=True)
class _Order:
    """The shifts of some blocks, by block, then by class, then by rank."""

    ranks: Positions  # from 0 at the first block
    groups: Positions  # [blocks x classes], how many there are of each

    @classmethod
    def of(cls, keys: Keys, thresholds: Keys) -> _Order:
        """The order of whole blocks, given their base's keys."""
        classes, blocks = thresholds.size + 1, -(-keys.size // BLOCK)
        # A table tells the class of each key: searching for each takes ten times as long; and bytes sort as fast.
        of_key = np.searchsorted(thresholds, np.arange(KEYS), side="right").astype(np.uint8)
        of_class = np.full((blocks, BLOCK), classes, np.uint8)
        of_class.reshape(-1)[: keys.size] = of_key[keys]
        ranks = np.argsort(of_class, axis=1, kind="stable") + np.arange(blocks)[:, None] * BLOCK
        every = (of_class + np.arange(blocks, dtype=np.int64)[:, None] * (classes + 1)).reshape(-1)
        groups = np.bincount(every, minlength=blocks * (classes + 1)).reshape(blocks, classes + 1)
        return cls(ranks.reshape(-1)[: keys.size], groups[:, :classes].reshape(-1))


@dataclass(frozen=True)
class _ClassedParts:
    """A section taken apart; sizes are checked."""

    thresholds: Keys
    k: Positions  # of each class
    j: Positions
    starts: Positions  # [blocks + 1], the first bit of each
    counts: Positions  # [blocks, classes], how many shifts are listed
    signs: Bytes
    stream: Bytes  # with the slack
    end: int  # where the slack starts
    padding_is_zero: bool

    @classmethod
    def of(cls, data: Bytes, nnz: int) -> _ClassedParts:
        """Raises FormatError where the parts contradict each other or the size."""
        classes, width, bits = HEAD.unpack_from(data.data)
        if not 0 < classes <= registry.MAX_BASE_CLASSES or width > _MOST_COUNT or data[2:8].any():
            raise FormatError("bad_value", f"{classes} classes, counts of {width} bits, or what follows is not zero")
        taken, blocks = PartsReader(data, HEAD.size), -(-nnz // BLOCK)
        thresholds = taken.numbers(2 * (classes - 1)).view("<u2")
        if np.any(thresholds[1:] < thresholds[:-1]):
            raise FormatError("bad_value", "thresholds decrease")
        pairs = taken.numbers(2 * classes).reshape(classes, 2).astype(np.int64)
        if np.any(pairs > (MOST_K, MOST_J)):
            raise FormatError("bad_value", f"k is {pairs[:, 0].max()}, j is {pairs[:, 1].max()}")
        counts = np.stack([taken.fields(blocks, width) for _ in range(classes)], axis=1)
        directory, word = taken.at, registry.word_size(bits)
        signs = directory + blocks * word
        stream = signs + 4 * -(-nnz // 32)
        end = stream + 4 * -(-bits // 32)
        if end + registry.SLACK != data.size:
            raise FormatError("bad_size", f"{data.size} bytes for {bits} bits of {nnz} shifts")
        starts = np.append(part(data, directory, blocks, f"<u{word}").astype(np.int64), bits)
        if starts[0] or np.any(starts[1:] < starts[:-1]):
            raise FormatError("bad_directory", "the blocks' first bits do not increase from 0 to all")
        listed_bits = data[stream:]
        return cls(
            thresholds,
            pairs[:, 0],
            pairs[:, 1],
            starts,
            counts,
            data[signs:stream],
            listed_bits,
            end - stream,
            taken.padding_is_zero,
        )

    def magnitudes(self, keys: Keys, most: int) -> Positions:
        """int64, of all shifts.

        Args:
            keys: of the base's elements.
            most: the largest magnitude.

        Raises:
            FormatError: the stream of a block is damaged, or it was made for another base.
        """
        result, order = np.ones(keys.size, np.int64), _Order.of(keys, self.thresholds)
        groups = self.counts.ravel()
        if np.any(groups > order.groups):
            raise FormatError("wrong_base", "a block lists more shifts of a class than there are")
        at, end, of_block = self.starts[:-1], self.starts[1:], self.counts.sum(1)
        lists = np.flatnonzero(of_block)
        if np.any(at[of_block == 0] != end[of_block == 0]):
            raise FormatError("bad_value", "bits of a block that lists no shifts")
        if not lists.size:
            return result
        k, j = (np.repeat(np.tile(each, self.counts.shape[0]), groups) for each in (self.k, self.j))
        gaps, beyond = read_listed(self.stream, at[lists], end[lists], BlockRuns(of_block[lists]), k, j)
        some = np.flatnonzero(groups)
        runs, starts = BlockRuns(groups[some]), np.cumsum(order.groups) - order.groups
        within = runs.up_to(gaps + 1) - 1
        if np.any(within >= runs.spread(order.groups[some])):
            raise FormatError("wrong_base", "a shift is listed outside of its class")
        if np.any(beyond > np.uint64(most - 2)):
            raise FormatError("bad_value", "a shift does not fit the elements")
        result[order.ranks[runs.spread(starts[some]) + within]] = beyond.astype(np.int64) + 2
        return result


class UlpFromBase(ValueCodec):
    """The value codec ULP_FROM_BASE; what needs no base cannot read it."""

    id = ValueId.ULP_FROM_BASE
    name = "ULP_FROM_BASE"
    option = None
    adds = False
    shifts = True
    minor = 1
    needs_base = True

    def size(self, nnz: int, size: int) -> int:
        return HEAD.size + 4 + 4 * -(-nnz // BLOCK) + 4 * -(-nnz // 32) + registry.SLACK

    def size_is_possible(self, section: int, nnz: int, size: int) -> bool:
        """Whether everything but classes and stream fits; the head tells the rest."""
        return section >= self.size(nnz, size)

    def encode(self, values: Array) -> NoReturn:
        raise AssertionError("no user chooses it")

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> NoReturn:
        raise FormatError("base_needed")

    def check(self, data: Bytes, nnz: int, size: int) -> NoReturn:
        raise FormatError("base_needed")

    def lead(self, data: Bytes, nnz: int) -> int:
        parts = _ClassedParts.of(data, nnz)
        return data.size - parts.signs.size - parts.stream.size

    def encode_on(self, shifts: Array, base: Array) -> bytes:
        """The section of shifts as unsigned bits, which are in the range that ULP has, given the base's elements."""
        size, nnz = shifts.itemsize, shifts.size
        signed = shifts.view(f"<i{size}").astype(np.int64)
        magnitudes, keys = np.abs(signed), keys_of(base)
        cuts = _thresholds(keys, magnitudes, size)
        classes, blocks = cuts.size + 1, -(-nnz // BLOCK)
        order = _Order.of(keys, cuts)
        ordered = magnitudes[order.ranks]
        at = np.flatnonzero(ordered > 1)
        ends = np.cumsum(order.groups)
        group = np.searchsorted(ends, at, side="right")
        within = at - (ends - order.groups)[group]
        gaps = within - np.where(np.diff(group, prepend=-1) > 0, -1, np.append(-1, within[:-1])[: at.size]) - 1
        beyond = ordered[at].astype(np.uint64) - np.uint64(2)
        of_class = group % classes
        of_each = [np.flatnonzero(of_class == each) for each in range(classes)]
        k = np.array([best_k(gaps[some]) for some in of_each])
        j = np.array([best_j(beyond[some], 8 * size - 2) for some in of_each])
        counts = np.bincount(group, minlength=blocks * classes).reshape(blocks, classes)
        lists, sizes, stream = np.flatnonzero(counts.sum(1)), np.zeros(blocks, np.int64), b""
        if lists.size:
            runs = BlockRuns(counts.sum(1)[lists])
            stream, sizes[lists] = write_listed(Listed(gaps, beyond), runs, k[of_class], j[of_class])
        bits, width = int(sizes.sum()), int(counts.max()).bit_length()
        return b"".join(
            (
                HEAD.pack(classes, width, bits),
                padded(cuts.astype("<u2").tobytes()),
                padded(np.stack((k, j), axis=1).astype(np.uint8).tobytes()),
                *(fields(column, width) for column in counts.T),
                (np.cumsum(sizes) - sizes).astype(f"<u{registry.word_size(bits)}").tobytes(),
                pack_flags(signed < 0),
                stream,
                SLACK,
            )
        )

    def decode_on(self, data: Bytes, nnz: int, size: int, base: Array) -> Array:
        """Unsigned [nnz], the bits of all shifts, given the base's elements at the positions.

        Raises:
            FormatError: the section is damaged, or was made for another base.
        """
        parts = _ClassedParts.of(data, nnz)
        found = parts.magnitudes(keys_of(base), (1 << (8 * size - 1)) - 1)
        minus: Small = np.unpackbits(parts.signs, bitorder="little")
        if (
            not parts.padding_is_zero
            or minus[nnz:].any()
            or has_unused_bits(parts.stream[: parts.end], int(parts.starts[-1]))
        ):
            raise FormatError("padding_not_zero", "unused bits of a part")
        check_zero(parts.stream, parts.end)
        return np.where(minus[:nnz], -found, found).astype(f"<i{size}").view(f"<u{size}")


def _thresholds(keys: Keys, magnitudes: Positions, size: int) -> Keys:
    """Where classes begin but for the first, given the base's keys of all shifts."""
    edges = np.arange(0, KEYS, round_step(size))
    bins, where = keys // round_step(size), np.flatnonzero(magnitudes > 1)
    # Few bins and magnitudes go together, so each pair is weighed once.  A pair has to fit 64 bits.
    least = np.minimum(magnitudes[where], 1 << 55).astype(np.uint64)
    of_pair, counts = counted(least * np.uint64(edges.size) + bins[where])
    beyond, of_listed = np.divmod(of_pair, np.uint64(edges.size))
    of_listed, beyond = of_listed.astype(np.int64), beyond - 2.0
    # What the magnitudes take in each bin, for each j: those of Exp-Golomb codes.
    bits = np.empty((edges.size, min(_JS, 8 * size - 1)))
    for j in range(bits.shape[1]):
        widths = 2 * np.floor(np.log2(beyond + (1 << j))) - j + 1
        bits[:, j] = np.bincount(of_listed, widths * counts, edges.size)
    elements = np.bincount(bins, minlength=edges.size)
    listed = np.bincount(of_listed, counts, edges.size)
    return thresholds(edges, elements, listed, size, -(-keys.size // BLOCK), bits=bits)
