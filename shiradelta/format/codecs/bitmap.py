"""BITMAP: one bit per element, and a rank per 2,048 bits (FORMAT.md, 4.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, between, check_positions, check_zero, part
from shiradelta.format.codecs.packing import count_ones, find_ones, pack_bitmap
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import ranges

BLOCK = registry.BLOCK_BITS


def _section_size(numel: int) -> int:
    return -(-numel // BLOCK) * registry.word_size(numel) + -(-numel // 32) * 4 + registry.SLACK


def _ranks(ones: Positions, numel: int) -> Positions:
    """The number of ones before each block."""
    return np.searchsorted(ones, np.arange(0, numel, BLOCK, dtype=np.int64))


def _parts(data: Bytes, numel: int) -> tuple[Array, Bytes]:
    """(directory, bitmap)."""
    word, blocks = registry.word_size(numel), -(-numel // BLOCK)
    return part(data, 0, blocks, f"<u{word}"), data[blocks * word : data.size - registry.SLACK]


class Bitmap(IndexCodec):
    """The index codec BITMAP."""

    id = IndexId.BITMAP
    name = "BITMAP"

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        return _section_size(math.prod(shape))

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        return size == _section_size(numel)

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        numel = math.prod(shape)
        ranks = _ranks(positions, numel).astype(f"<u{registry.word_size(numel)}")
        return ranks.tobytes() + pack_bitmap(positions, numel) + SLACK

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """Finds the set bits, and checks them against count and directory."""
        numel = math.prod(shape)
        directory, bitmap = _parts(data, numel)
        padding = int(np.count_nonzero(find_ones(bitmap[numel // 8 :]) >= numel % 8))
        inside = count_ones(bitmap) - padding
        if inside != nnz:
            raise FormatError("bad_index", f"{inside} ones for {nnz} nonzeros")
        rank = 0
        for start, stop in ranges(numel):
            ones = find_ones(bitmap[start // 8 : -(-stop // 8)])
            ones = ones[: np.searchsorted(ones, stop - start)]
            if not np.array_equal(directory[start // BLOCK : -(-stop // BLOCK)], rank + _ranks(ones, stop - start)):
                raise FormatError("bad_directory", "rank of a block")
            rank += ones.size
            yield ones + start
        if padding:
            raise FormatError("padding_not_zero", "bits behind the last element")
        check_zero(data, data.size - registry.SLACK)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        numel = math.prod(shape)
        directory, bitmap = _parts(data, numel)
        first, last = start // BLOCK, -(-stop // BLOCK)
        positions = find_ones(bitmap[first * BLOCK // 8 : last * BLOCK // 8]) + first * BLOCK
        check_positions(positions, numel)
        skip, inside = between(positions, start, stop)
        rank, end = (int(directory[block]) if block < directory.size else nnz for block in (first, last))
        if rank + positions.size != end or end > nnz:
            raise FormatError("bad_directory", f"rank of block {first}")
        return rank + skip, inside
