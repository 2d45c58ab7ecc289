"""SEEDED: positions that a seed gives, or those of them that are listed (FORMAT.md, 4.8)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import SLACK, Bytes, IndexCodec, between, check_zero
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.draw import Draw
from shiradelta.format.registry import IndexId
from shiradelta.util.arrays import ranges

HEAD = registry.SEEDED_HEAD


class Seeded(IndexCodec):
    """The index codec SEEDED.

    Args:
        rice: the codec of the cells that are listed.
    """

    id = IndexId.SEEDED
    name = "SEEDED"
    minor = 1
    least = HEAD.size + registry.SLACK

    def __init__(self, rice: Rice) -> None:
        self._rice = rice

    def size(self, positions: Positions, shape: tuple[int, ...]) -> None:
        """None: a writer that knows the draw calls `encode_from`."""

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether the smallest section fits; the head tells the rest."""
        return size >= self.least

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> NoReturn:
        raise AssertionError("size() tells")

    def encode_from(self, draw: Draw, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """The section.

        Raises:
            DeltaError: a position is not of the draw.
        """
        cells = draw.cells_of(positions, math.prod(shape))
        head = HEAD.pack(draw.seed, draw.cells)
        if cells.size == draw.cells:
            return head + SLACK
        if lists_others(cells.size, draw):
            kept = np.ones(draw.cells, np.bool_)
            kept[cells] = False
            cells = np.flatnonzero(kept)
        return head + self._rice.encode(cells, (draw.cells,))

    def lead(self, data: Bytes, nnz: int, numel: int) -> int:
        draw, rest = draw_of(data, nnz, numel), data[HEAD.size :]
        listed = _listed(nnz, draw)
        return HEAD.size + (self._rice.lead(rest, listed, draw.cells) if listed else 0)

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        return np.concatenate(list(self.windows(data, nnz, shape)))

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        numel = math.prod(shape)
        draw, rest = draw_of(data, nnz, numel), data[HEAD.size :]
        if not _listed(nnz, draw):
            check_zero(rest, 0)
            for _, positions in draw.windows(numel):
                yield positions
            return
        listed = self._rice.windows(rest, _listed(nnz, draw), (draw.cells,))
        for cells in _others(listed, draw.cells) if lists_others(nnz, draw) else listed:
            yield draw.at(cells, numel)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """Decodes only the blocks of cells that can hold the range."""
        numel = math.prod(shape)
        draw, rest = draw_of(data, nnz, numel), data[HEAD.size :]
        first = min(draw.cell_of(start, numel), draw.cells)
        last = max(draw.cell_of(stop - 1, numel) + 1, first)
        rank, cells = 0, np.zeros(0, np.int64)
        if _listed(nnz, draw):
            rank, cells = self._rice.decode_between(rest, _listed(nnz, draw), (draw.cells,), first, last)
        if lists_others(nnz, draw):
            rank, cells = first - rank, np.delete(np.arange(first, last, dtype=np.int64), cells - first)
            if not 0 <= rank <= nnz - cells.size:
                raise FormatError("bad_directory", f"rank of the block with cell {first} or {last}")
        skip, inside = between(draw.at(cells, numel), start, stop)
        return rank + skip, inside


def lists_others(nnz: int, draw: Draw) -> bool:
    """Whether the cells without a nonzero are listed, which are fewer than those with one."""
    return 2 * nnz > draw.cells


def _listed(nnz: int, draw: Draw) -> int:
    """How many cells are listed."""
    return draw.cells - nnz if lists_others(nnz, draw) else nnz


def draw_of(data: Bytes, nnz: int, numel: int) -> Draw:
    """The draw that a section is of.

    Raises:
        FormatError: there is no such draw, or the section is too small or too large for what it lists.
    """
    draw = Draw(*HEAD.unpack_from(data.data))
    if draw.cells < nnz or not draw.is_possible(numel):
        raise FormatError("bad_index", f"{nnz} of {draw.cells} cells, {numel} elements")
    size = data.size - HEAD.size
    if size != registry.SLACK if draw.cells == nnz else size < registry.RICE_HEAD.size + registry.SLACK:
        raise FormatError("bad_size", f"{data.size} bytes for {nnz} of {draw.cells} cells")
    return draw


def _others(listed: Iterator[Positions], cells: int) -> Iterator[Positions]:
    """The cells that are not listed, in runs of at most `WINDOW`."""
    done = 0
    for some in listed:
        stop = int(some[-1]) + 1 if some.size else done
        yield from _without(some, done, stop)
        done = stop
    yield from _without(np.zeros(0, np.int64), done, cells)


def _without(listed: Positions, start: int, stop: int) -> Iterator[Positions]:
    """The numbers from start to stop - 1 but those listed."""
    for first, last in ranges(stop - start):
        numbers = np.arange(start + first, start + last, dtype=np.int64)
        _, some = between(listed, start + first, start + last)
        yield np.delete(numbers, some - numbers[0])
