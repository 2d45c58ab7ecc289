"""Heads, numbers and fields of many sections at once, in NumPy: one call for all of them, whatever their number.

What is read here decides nothing by itself: a caller that finds anything wrong lets the codecs say what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.util.arrays import exclusive, within


class Pool:
    """Bytes in which sections lie, each at a multiple of 4.  What is read beyond their end is zero.

    Args:
        data: the bytes, a multiple of 4.
    """

    def __init__(self, data: Bytes) -> None:
        self._bytes, self._words = data, data.view("<u4")

    @classmethod
    def of(cls, sections: Sequence[Bytes]) -> tuple[Pool, Positions]:
        """(a pool of some sections, where each of them starts): their own memory, if they are parts of one array."""
        bases = {id(section.base) for section in sections}
        base = sections[0].base
        if len(bases) == 1 and isinstance(base, np.ndarray) and base.dtype == np.uint8 and base.size % 4 == 0:
            origin = base.ctypes.data
            starts = np.array([section.ctypes.data for section in sections], np.int64) - origin
            if base.flags.c_contiguous and origin % 4 == 0 and not np.any(starts % 4):
                return cls(base), starts
        sizes = np.array([section.size for section in sections], np.int64)
        starts = exclusive(-(-sizes // 4) * 4)
        data = np.zeros(int(starts[-1] + -(-sizes[-1] // 4) * 4), np.uint8)
        for start, section in zip(starts.tolist(), sections, strict=True):
            data[start : start + section.size] = section
        return cls(data), starts

    def rows(self, starts: Positions, width: int) -> npt.NDArray[np.uint8]:
        """uint8 [starts, width], the bytes from each start on."""
        at = starts[:, None] + np.arange(width)
        found: npt.NDArray[np.uint8] = self._bytes[np.minimum(at, self._bytes.size - 1)]
        return np.where(at < self._bytes.size, found, np.uint8(0))

    def numbers(self, starts: Positions, counts: Positions) -> npt.NDArray[np.uint8]:
        """The bytes of all parts, one after the other, each from a start on."""
        at = np.repeat(starts, counts) + within(counts)
        found: npt.NDArray[np.uint8] = self._bytes[np.minimum(at, self._bytes.size - 1)]
        return found

    def fields(self, bits: Positions, widths: Positions) -> Positions:
        """int64, fields of up to 32 bits, each from a bit on."""
        word, last = bits >> 5, self._words.size - 1
        low, high = (self._words[np.minimum(each, last)].astype(np.uint64) for each in (word, word + 1))
        both = (low | (high << np.uint64(32))) >> (bits & 31).astype(np.uint64)
        found: Positions = both.astype(np.int64) & ((1 << widths) - 1)
        return found

    def are_zero(self, starts: Positions, stops: Positions) -> bool:
        """Whether all bits are, from a start up to a stop, of which no two are 64 bits apart."""
        widths = np.maximum(stops - starts, 0)
        first = np.minimum(widths, 32)
        return not (self.fields(starts, first).any() or self.fields(starts + 32, widths - first).any())


def words_of(bits: Positions) -> Positions:
    """Bytes of so many bits in whole words."""
    found: Positions = -(-bits // 32) * 4
    return found


def padded(sizes: Positions) -> Positions:
    """Sizes in bytes, in whole words."""
    found: Positions = -(-sizes // 4) * 4
    return found
