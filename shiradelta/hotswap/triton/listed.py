"""What tiles list, from gaps to numbers in the order, by kernels: a program for each 1,024 listed elements of a cell (FORMAT.md, 4.7).

A cell is a group of a tile.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from shiradelta.format import registry
from shiradelta.hotswap.bits_there import sent
from shiradelta.hotswap.triton.counted import launch, owners
from shiradelta.hotswap.triton.ordered import BLOCK
from shiradelta.hotswap.triton.positions import INT32
from shiradelta.util.arrays import exclusive

Tensor = torch.Tensor
#: The columns of a cell's row, all int64.
COLUMNS = ("first", "count", "program", "k", "low", "tile_first", "tile_begin", "number")
_FIRST = tl.constexpr(0)  # number of its first listed element
_COUNT = tl.constexpr(1)
_PROGRAM = tl.constexpr(2)  # number of the program of its first elements
_K = tl.constexpr(3)
_LOW = tl.constexpr(4)  # bit of its first low field in the buffer
_TILE_FIRST = tl.constexpr(5)  # number of the tile's first listed element
_TILE_BEGIN = tl.constexpr(6)  # the tile's first unary bit
_NUMBER = tl.constexpr(7)  # its own among all cells
_WIDTH = tl.constexpr(len(COLUMNS))
_LARGEST = tl.constexpr(registry.MAX_BASE_TILE)


@triton.jit
def _elements(table, cell_of, BLOCK: tl.constexpr):
    """(the row of a cell, numbers of listed elements, which of them there are)."""
    row = table + tl.load(cell_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    within = (tl.program_id(0) - tl.load(row + _PROGRAM)) * BLOCK + tl.arange(0, BLOCK)
    return row, tl.load(row + _FIRST) + within, within < tl.load(row + _COUNT)


@triton.jit
def step_kernel(table, cell_of, buffer, ones, steps, BLOCK: tl.constexpr):
    """By how many elements of the group each listed one is behind the one before: int32.

    No gap is larger than a tile; what a damaged one says must not overflow the sums.
    """
    row, number, inside = _elements(table, cell_of, BLOCK)
    one = tl.load(ones + number, mask=inside, other=0)
    is_first = number == tl.load(row + _TILE_FIRST)
    before = tl.load(ones + number - 1, mask=inside & (number > 0), other=-1)
    zeros = one - tl.where(is_first, tl.load(row + _TILE_BEGIN) - 1, before) - 1
    zeros = tl.minimum(tl.maximum(zeros, 0), _LARGEST)
    k = tl.load(row + _K)
    at = tl.load(row + _LOW) + (number - tl.load(row + _FIRST)) * k
    word = buffer.to(INT32) + (at >> 5)
    low = tl.load(word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(word + 1, mask=inside & ((at & 31) + k > 32), other=0).to(tl.int64)
    field = ((low | (high << 32)) >> (at & 31)) & ((tl.full([1], 1, tl.int64) << k) - 1)
    step = tl.minimum((zeros << k) + field, _LARGEST) + 1
    tl.store(steps + number, step.to(tl.int32), mask=inside)


@triton.jit
def number_kernel(table, cell_of, sums, stops, cells, numbers, beyond, BLOCK: tl.constexpr):
    """The cell of each listed element, and its number in the order of tiles, both int32.

    `beyond` is set where a group has fewer elements; those are taken for its first.
    """
    row, number, inside = _elements(table, cell_of, BLOCK)
    first, cell = tl.load(row + _FIRST), tl.load(row + _NUMBER)
    before = tl.load(sums + first - 1, mask=first > 0, other=0)
    start = tl.load(stops + cell - 1, mask=cell > 0, other=0)
    at = tl.load(sums + number, mask=inside, other=0) - before - 1 + start
    fits = at < tl.load(stops + cell)
    tl.store(beyond + (number - number), 1, mask=inside & (fits == 0))
    tl.store(cells + number, (number - number + cell).to(tl.int32), mask=inside)
    tl.store(numbers + number, tl.where(fits, at, start).to(tl.int32), mask=inside)


def listed(
    cells: dict[str, np.ndarray], buffer: Tensor, ones: Tensor, stops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(the cell of each listed element, int32; its number in the order, int32; int32 [1], 0 if all of them are there).

    Args:
        cells: columns of cells that list something, but for programs.
        buffer: uint8, the sections.
        ones: int64, the unary bits that are set.
        stops: int64, of all cells, where they end in the order.
    """
    device, programs = buffer.device, -(-cells["count"] // BLOCK)
    every = {**cells, "program": exclusive(programs)}
    table = sent(np.stack([every[name] for name in COLUMNS], axis=1), device)
    cell_of = owners(programs, device)
    count = cell_of.numel()
    steps, own = (torch.empty(ones.numel(), dtype=torch.int32, device=device) for _ in range(2))
    beyond = torch.zeros(1, dtype=torch.int32, device=device)
    if count:
        launch(step_kernel, count, device, table, cell_of, buffer, ones, steps)
        sums = steps.cumsum(0)
        launch(number_kernel, count, device, table, cell_of, sums, stops, own, steps, beyond)
    return own, steps, beyond
