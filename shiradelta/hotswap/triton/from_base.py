"""FROM_BASE with two kernels that go through the base's elements, which plain torch operations would sort.

The first counts the elements of each group in each block, so that prefix sums tell where the group's elements of a
block are among all of them.  What is listed is marked there, in a byte for each element.  The second finds the mark of
each element.
"""

# mypy: ignore-errors

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from shiradelta.format.codecs.base_classes import KEYS
from shiradelta.hotswap.from_base import Chunk, GroupTable, InGroups, TorchFromBase

#: Elements of a program, which counts four groups in 16 bits each of a 64-bit number.
_BLOCK = 1024
_BITS, _MASK, _EACH = tl.constexpr(16), tl.constexpr(0xFFFF), tl.constexpr(4)
_KEYS = tl.constexpr(KEYS)


@triton.jit
def _block(base, numel, size, per_tile, BLOCK: tl.constexpr):
    """(its tile, its number in the tile, the elements, which of them there are)."""
    tile = tl.program_id(0) // per_tile
    block = tl.program_id(0) % per_tile
    within = block * BLOCK + tl.arange(0, BLOCK)
    at = tile * size + within
    return tile, block, at, (within < size) & (at < numel)


@triton.jit
def _group(
    base,
    at,
    inside,
    groups,
    rows,
    columns,
    width,
    classes,
    SHIFT: tl.constexpr,
    KEY: tl.constexpr,
    LINES: tl.constexpr,
):
    """The group of each element."""
    bits = tl.load(base + at, mask=inside, other=0)
    key = (bits >> SHIFT).to(tl.int32) & KEY
    if LINES:
        row = tl.load(rows + at // width, mask=inside, other=0)
        column = tl.load(columns + at % width, mask=inside, other=0)
        key += (row * classes + column) * _KEYS
    return tl.load(groups + key, mask=inside, other=0).to(tl.int32)


@triton.jit
def _ones(group, inside, first):
    """A one in the place of each element's group, if that is among the four from `first` on."""
    one = tl.full(group.shape, 1, tl.int64) << ((group % _EACH) * _BITS).to(tl.int64)
    return tl.where(inside & (group // _EACH == first // _EACH), one, 0)


@triton.jit(do_not_specialize=["numel", "size", "per_tile", "width", "classes", "count"])
def count_kernel(
    base,
    numel,
    size,
    per_tile,
    groups,
    rows,
    columns,
    width,
    classes,
    count,
    counts,
    SHIFT: tl.constexpr,
    KEY: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts elements: int32 [tiles, groups, blocks of a tile]."""
    tile, block, at, inside = _block(base, numel, size, per_tile, BLOCK)
    group = _group(base, at, inside, groups, rows, columns, width, classes, SHIFT, KEY, LINES)
    out = counts + tile * count * per_tile + block
    for first in range(0, count, _EACH):
        sums = tl.sum(_ones(group, inside, first), 0)
        for each in tl.static_range(_EACH):
            found = ((sums >> (each * _BITS)) & _MASK).to(tl.int32)
            tl.store(out + (first + each) * per_tile, found, mask=first + each < count)


@triton.jit(do_not_specialize=["numel", "size", "per_tile", "width", "classes", "count"])
def find_kernel(
    base,
    numel,
    size,
    per_tile,
    groups,
    rows,
    columns,
    width,
    classes,
    count,
    starts,
    marks,
    turned,
    found,
    SHIFT: tl.constexpr,
    KEY: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Says of each element whether it is a nonzero; `starts` is what is before each of `counts`."""
    tile, block, at, inside = _block(base, numel, size, per_tile, BLOCK)
    group = _group(base, at, inside, groups, rows, columns, width, classes, SHIFT, KEY, LINES)
    rank = tl.full(group.shape, 0, tl.int32)
    for first in range(0, count, _EACH):
        ones = _ones(group, inside, first)
        sums = tl.cumsum(ones, 0) >> ((group % _EACH) * _BITS).to(tl.int64)
        rank = tl.where(ones != 0, (sums & _MASK).to(tl.int32), rank)
    before = tl.load(starts + (tile * count + group) * per_tile + block, mask=inside, other=0)
    mark = tl.load(marks + before + rank - 1, mask=inside, other=0)
    tl.store(found + at, mark ^ tl.load(turned + group, mask=inside, other=0), mask=inside)


class Counted(InGroups):
    """`InGroups` by counting."""

    def __init__(self, chunk: Chunk, table: GroupTable) -> None:
        base, size, count = chunk.base, chunk.size, table.turned.numel()
        per_tile, tiles = -(-size // _BLOCK), -(-base.numel() // size)
        self._base, self._turned = base, table.turned.byte()
        lines = chunk.rows, chunk.columns, chunk.columns.numel(), table.column_classes
        self._given = base, base.numel(), size, per_tile, table.groups, *lines, count
        width = 8 * base.element_size()
        key = {"SHIFT": max(width - 16, 0), "KEY": (1 << min(width - 1, 15)) - 1}
        self._kind = {**key, "LINES": table.has_lines, "BLOCK": _BLOCK}
        self._grid = (tiles * per_tile,)
        counts = torch.empty(tiles * count * per_tile, dtype=torch.int32, device=base.device)
        self._run(count_kernel, counts)
        ends = counts.cumsum(0, dtype=torch.int32)
        self._starts = ends - counts
        self.stops = ends.view(-1, per_tile)[:, -1].long()

    def nonzeros(self, listed: torch.Tensor) -> torch.Tensor:
        marks, found = (torch.zeros_like(self._base, dtype=torch.uint8) for _ in range(2))
        marks[listed] = 1
        self._run(find_kernel, self._starts, marks, self._turned, found)
        return found.nonzero().view(-1)

    def _run(self, kernel, *arguments) -> None:
        device = self._base.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[self._grid](*self._given, *arguments, **self._kind)


class TritonFromBase(TorchFromBase):
    """Reads the index codec FROM_BASE with kernels, which take a tenth of the memory of plain torch operations."""

    chunk, element_room = 1 << 26, 4

    def in_groups(self, chunk: Chunk, table: GroupTable) -> InGroups:
        return Counted(chunk, table)
