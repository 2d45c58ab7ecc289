"""ALL: every position, in no bytes (FORMAT.md, 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes, IndexCodec
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import ranges


class AllPositions(IndexCodec):
    """The index codec ALL."""

    id = IndexId.ALL
    name = "ALL"

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        return 0 if positions.size == math.prod(shape) else None

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        return size == 0

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        return b""

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.arange(nnz, dtype=np.int64)

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        for start, stop in ranges(nnz):
            yield np.arange(start, stop, dtype=np.int64)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        return start, np.arange(start, stop, dtype=np.int64)
