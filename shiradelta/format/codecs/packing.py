"""Bit packing: bitmaps and arrays of k-bit fields in u32 words, bit 0 first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.util.arrays import WINDOW, ranges

Words = npt.NDArray[np.uint32]


def pack_bitmap(ones: Positions, bits: int) -> bytes:
    """A bitmap of `bits` bits in whole u32 words, with the bits `ones` set."""
    flags = np.zeros(-(-bits // 32) * 32, np.uint8)
    flags[ones] = 1
    return np.packbits(flags, bitorder="little").tobytes()


def pack_flags(flags: npt.NDArray[np.bool_]) -> bytes:
    """A bitmap of flags in whole u32 words."""
    packed = np.packbits(flags, bitorder="little").tobytes()
    return packed + bytes(-len(packed) % 4)


def has_unused_bits(bitmap: Bytes, bits: int) -> bool:
    """Whether a bitmap of `bits` bits in whole u32 words has a bit above its last one."""
    return bits % 32 > 0 and int.from_bytes(bitmap[-4:].tobytes(), "little") >> bits % 32 > 0


def find_ones(bitmap: Bytes) -> Positions:
    """The indices of the set bits, increasing."""
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).astype(np.int64, copy=False)


def count_ones(bitmap: Bytes) -> int:
    """The number of set bits."""
    return sum(
        int(np.count_nonzero(np.unpackbits(bitmap[start:stop]))) for start, stop in ranges(bitmap.size, WINDOW // 8)
    )


def field_words(count: int, k: int) -> int:
    """u32 words of `count` fields of k bits."""
    return -(-count * k // 32)


def pack_fields(fields: Array, k: int) -> bytes:
    """k-bit fields one after the other, 1 <= k <= 31.

    32 fields fill exactly k words, and the j-th of each 32 starts at the same bit of them.  So 32 shifts of whole
    columns do the work.
    """
    groups = -(-fields.size // 32)
    columns = np.zeros((32, groups), np.uint32)
    full = fields.size // 32
    columns[:, :full] = fields[: full * 32].reshape(full, 32).T
    if full < groups:
        columns[: fields.size - full * 32, full] = fields[full * 32 :]
    words = np.zeros((k, groups), np.uint32)
    for j in range(32):
        word, shift = divmod(j * k, 32)
        words[word] |= columns[j] << np.uint32(shift)
        if shift + k > 32:
            words[word + 1] |= columns[j] >> np.uint32(32 - shift)
    return words.T.reshape(-1)[: field_words(fields.size, k)].astype("<u4").tobytes()


def put_fields(words: npt.NDArray[np.uint64], at: Positions, fields: npt.NDArray[np.uint64]) -> None:
    """Sets fields of any width in a bitmap of zeros.

    Args:
        words: the bitmap, with a word more than the fields reach.
        at: the first bit of each field, not decreasing; no two fields overlap.
        fields: numbers of no more bits than their fields have.
    """
    if not at.size:
        return
    word, low = at >> 6, (at & 63).astype(np.uint64)
    firsts = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[firsts]] |= np.bitwise_or.reduceat(fields << low, firsts)
    # A shift by 64 bits is not defined, so what is left for the next word moves in two.  Few fields lie across.
    beyond = (fields >> np.uint64(1)) >> (np.uint64(63) - low)
    across = np.flatnonzero(beyond)
    words[word[across] + 1] |= beyond[across]


def unpack_fields(words: Words, k: int, start: int, stop: int) -> Positions:
    """The packed fields from start to stop - 1, int64; 1 <= k <= 31."""
    first, last = start // 32, -(-stop // 32)
    groups = last - first
    padded = np.zeros(groups * k, np.uint32)
    taken = words[first * k : last * k]
    padded[: taken.size] = taken
    columns = np.ascontiguousarray(padded.reshape(groups, k).T)
    fields = np.empty((32, groups), np.uint32)
    for j in range(32):
        word, shift = divmod(j * k, 32)
        fields[j] = columns[word] >> np.uint32(shift)
        if shift + k > 32:
            fields[j] |= columns[word + 1] << np.uint32(32 - shift)
    fields &= np.uint32((1 << k) - 1)
    return fields.T.reshape(-1)[start - first * 32 : stop - first * 32].astype(np.int64)
