"""RAW: positions as words (FORMAT.md, 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, between, check_positions, check_zero, part
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import ranges


class Raw(IndexCodec):
    """The index codec RAW."""

    id = IndexId.RAW
    name = "RAW"

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        return positions.size * registry.word_size(math.prod(shape)) + registry.SLACK

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        return size == nnz * registry.word_size(numel) + registry.SLACK

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        return positions.astype(f"<u{registry.word_size(math.prod(shape))}").tobytes() + SLACK

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        numel = math.prod(shape)
        word = registry.word_size(numel)
        stored = part(data, 0, nnz, f"<u{word}")
        if np.any(stored[1:] <= stored[:-1]):
            raise FormatError("position_order")
        if stored[-1] >= numel:
            raise FormatError("position_range", f"position {stored[-1]} of {numel} elements")
        check_zero(data, nnz * word)
        for start, stop in ranges(nnz):
            yield stored[start:stop].astype(np.int64)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Finds the range by binary search; checks only the positions that it returns."""
        numel = math.prod(shape)
        stored = part(data, 0, nnz, f"<u{registry.word_size(numel)}")
        # Bounds of the words' own dtype keep NumPy from converting the whole array.
        low, high = stored.dtype.type(start), stored.dtype.type(min(stop, np.iinfo(stored.dtype).max))
        rank, end = int(np.searchsorted(stored, low)), int(np.searchsorted(stored, high))
        positions = stored[rank:end].astype(np.int64)
        if np.any(positions[1:] <= positions[:-1]):
            raise FormatError("position_order")
        check_positions(positions, numel)
        skip, positions = between(positions, start, stop)
        return rank + skip, positions
