"""What tiles list, from gaps to numbers in cells: a program for each 1,024 listed elements of a cell.

A cell is a group of a tile (FORMAT.md, 4.7).
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.hotswap.bits_there import joined, ones_of
from shiradelta.hotswap.heads import TiledSections
from shiradelta.hotswap.lists_there import TileLists
from shiradelta.hotswap.pool import words_of
from shiradelta.hotswap.triton.counted import launch
from shiradelta.hotswap.triton.positions import INT32

Tensor = torch.Tensor
#: Listed elements of a program.
BLOCK = 1024
#: The columns of a cell's row, all int64.
COLUMNS = ("first", "count", "program", "k", "low", "tile_first", "tile_begin")
_FIRST = tl.constexpr(0)  # number of its first listed element
_COUNT = tl.constexpr(1)
_PROGRAM = tl.constexpr(2)  # number of the program of its first elements
_K = tl.constexpr(3)
_LOW = tl.constexpr(4)  # bit of its first low field in the buffer
_TILE_FIRST = tl.constexpr(5)  # number of the tile's first listed element
_TILE_BEGIN = tl.constexpr(6)  # the tile's first unary bit
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
def rank_kernel(table, cell_of, sums, sizes, cells, ranks, beyond, BLOCK: tl.constexpr):
    """The cell of each listed element, and its number in the cell, both int32.

    `beyond` is set where a cell has fewer elements; those are taken for its first.
    """
    row, number, inside = _elements(table, cell_of, BLOCK)
    first, cell = tl.load(row + _FIRST), tl.load(cell_of + tl.program_id(0))
    rank = tl.load(sums + number, mask=inside, other=0) - tl.load(sums + first - 1, mask=first > 0, other=0) - 1
    fits = rank < tl.load(sizes + cell)
    tl.store(beyond + (number - number), 1, mask=inside & (fits == 0))
    tl.store(cells + number, (number - number).to(tl.int32) + cell, mask=inside)
    tl.store(ranks + number, tl.where(fits, rank, 0).to(tl.int32), mask=inside)


class ListedThere:
    """What tiles list, one element after the other; `of` waits for the device, and the rest does not.

    Args:
        lists: those of the tiles.
        buffer: uint8, the sections.
        ones: int64, the unary bits of all sections that are set, as many as elements are listed.
        of_cells: how many programs each cell has.
        programs: how many all of them have.
    """

    def __init__(self, lists: TileLists, buffer: Tensor, ones: Tensor, of_cells: Tensor, programs: int) -> None:
        device, count = buffer.device, ones.numel()
        self._steps = torch.empty(count, dtype=torch.int32, device=device)
        self._programs, self._good = programs, [lists.sound]
        if not count:
            return
        first, last = (lists.firsts.clamp(max=count - 1), (lists.firsts + lists.counts - 1).clamp(min=0))
        has_ends = (ones[first] >= lists.begins) & (ones[last] == lists.begins + lists.bits - 1)
        self._good.append((has_ends | (lists.counts == 0)).all())
        ends = of_cells.cumsum(0)
        columns = {
            "first": lists.cell_firsts,
            "count": lists.cell_counts,
            "program": ends - of_cells,
            "k": lists.ks,
            "low": lists.lows,
            "tile_first": lists.firsts[lists.tile],
            "tile_begin": lists.begins[lists.tile],
        }
        table = torch.stack([columns[name] for name in COLUMNS], dim=1)
        every = torch.arange(programs, device=device)
        self._cells = table, torch.searchsorted(ends, every, right=True, out_int32=True)
        self._run(step_kernel, buffer, ones, self._steps)

    @classmethod
    def of(cls, heads: TiledSections, buffer: Tensor, sections: Positions) -> ListedThere | None:
        """That of sections that start there in a buffer; None where there is not as much as they say."""
        lists, unary_at = TileLists.of(heads, buffer, sections), sections + heads.unary_at
        ones = ones_of(joined(buffer, unary_at, unary_at + words_of(heads.unary_total)))
        of_cells = -(-lists.cell_counts // BLOCK)
        count, programs = torch.stack((lists.cell_counts.sum(), of_cells.sum())).tolist()
        return cls(lists, buffer, ones, of_cells, programs) if ones.numel() == count else None

    def ranks(self, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the cell of each listed element, int32; its number in the cell, int32; bool: whether all of them are there).

        Args:
            sizes: int32, of all cells, how many elements they have.
        """
        cells, ranks = torch.empty_like(self._steps), torch.empty_like(self._steps)
        beyond = torch.zeros(1, dtype=torch.int32, device=sizes.device)
        if cells.numel():
            self._run(rank_kernel, self._steps.cumsum(0), sizes, cells, ranks, beyond)
        return cells, ranks, torch.stack([*self._good, beyond[0] == 0]).all()

    def _run(self, kernel, *arguments) -> None:
        launch(kernel, self._programs, self._steps.device, *self._cells, *arguments, BLOCK=BLOCK)
