"""Elements of tiles in the order of their groups: tables on the device, and what runs the kernels of `groups`."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.hotswap.bits_there import sent
from shiradelta.hotswap.triton.groups import (
    ALIGNMENT,
    BLOCK,
    COLUMNS,
    collect_kernel,
    count_kernel,
    find_kernel,
    mark_kernel,
    place_kernel,
)
from shiradelta.util.arrays import exclusive, within

Tensor = torch.Tensor
#: Words of bits of a program that goes through nonzeros.
_WORDS = 1024


class Tiles(NamedTuple):
    """Tiles on a device.

    Attributes:
        rows: int64 [tiles, columns].
        tile_of: int32, the tile of each program.
        lasts: int64, the number of each cell's last count; a cell is a group of a tile.
        elements: how many there are.
        counts: how many there are.
        size: bytes of an element.
        has_lines: whether a tile has classes of rows or columns.
        has_turned: whether what a tile lists of a group may be no nonzeros.
        is_aligned: whether sizes and addresses of all tiles are multiples of 16.
    """

    rows: Tensor
    tile_of: Tensor
    lasts: Tensor
    elements: int
    counts: int
    size: int
    has_lines: bool
    has_turned: bool
    is_aligned: bool

    @classmethod
    def of(
        cls,
        columns: Mapping[str, np.ndarray | int],
        size: int,
        device: torch.device,
        *,
        has_lines: bool = False,
        has_turned: bool = False,
    ) -> Tiles:
        """Makes the columns about programs, counts and the order, which follow from sizes and groups.

        Args:
            columns: the others; a number is that of all tiles, and one that is missing is 0.
            size: bytes of an element.
            device: where to.
            has_lines: whether a tile has classes of rows or columns.
            has_turned: whether what a tile lists of a group may be no nonzeros.
        """
        sizes = np.asarray(columns["size"], np.int64)
        groups, blocks = np.broadcast_to(columns["groups"], sizes.shape), -(-sizes // BLOCK)
        made = {"blocks": blocks, "program": exclusive(blocks), "start": exclusive(sizes)}
        made["counts"] = exclusive(groups * blocks)
        every = {**columns, **made}
        rows = np.stack([np.broadcast_to(every.get(name, 0), sizes.shape) for name in COLUMNS], axis=1)
        tile = np.repeat(np.arange(sizes.size), groups)
        lasts = made["counts"][tile] + (within(groups) + 1) * blocks[tile] - 1
        return cls(
            sent(rows.astype(np.int64), device),
            owners(blocks, device),
            sent(lasts, device),
            int(sizes.sum()),
            int((groups * blocks).sum()),
            size,
            has_lines,
            has_turned,
            not np.any((sizes | columns["base"]) % ALIGNMENT.value),
        )

    def run(self, kernel, *arguments) -> None:
        """Runs a program for each block."""
        kind = {"SIZE": self.size, "LINES": self.has_lines, "ALIGNED": self.is_aligned}
        launch(kernel, self.tile_of.numel(), self.rows.device, self.rows, self.tile_of, *arguments, **kind)


def owners(programs: np.ndarray, device: torch.device) -> Tensor:
    """int32, of each program of a launch, the number of what it works for, given how many programs each has."""
    each = sent(np.stack((np.arange(programs.size), programs)), device)
    return torch.repeat_interleave(each[0].int(), each[1], output_size=int(programs.sum()))


def launch(kernel, programs: int, device: torch.device, *arguments, **kind) -> None:
    """Runs a kernel on a device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **{"BLOCK": BLOCK, **kind})


class Counted:
    """The order of tiles' elements, by counting.

    Attributes:
        stops: int64, of each cell, where it ends in the order.
    """

    def __init__(self, tiles: Tiles) -> None:
        self._tiles, device = tiles, tiles.rows.device
        counts = torch.empty(tiles.counts, dtype=torch.int32, device=device)
        tiles.run(count_kernel, counts)
        ends = counts.cumsum(0, dtype=torch.int32)
        self._starts = ends - counts
        self.stops = ends[tiles.lasts].long()

    def no_marks(self) -> Tensor:
        """int32, a bit for each element in the order, none of them set."""
        return torch.zeros(self._tiles.elements // 32 + 1, dtype=torch.int32, device=self._starts.device)

    def marks(self, listed: Tensor) -> Tensor:
        """`no_marks` with the bits of these numbers set."""
        marks = self.no_marks()
        if listed.numel():
            launch(mark_kernel, -(-listed.numel() // BLOCK), marks.device, listed, listed.numel(), marks)
        return marks

    def find(self, marks: Tensor) -> tuple[Tensor, Tensor]:
        """The nonzeros, given what is listed: (a bit for each element of each block, int32; int32, how many it has)."""
        tiles, device = self._tiles, self._starts.device
        programs = tiles.tile_of.numel()
        found = torch.empty(programs * (BLOCK // 8), dtype=torch.uint8, device=device)
        counts = torch.empty(programs, dtype=torch.int32, device=device)
        tiles.run(find_kernel, self._starts, marks, found, counts, self._tiles.has_turned)
        return found.view(torch.int32), counts

    def collect(self, found: Tensor, counts: Tensor, most: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(positions in the tensors, int64 if `wide`, else int32; elements there; how many are up to each block).

        Args:
            found: of `find`.
            counts: of `find`.
            most: how many there should be.
            wide: positions take 64 bits.
        """
        device = found.device
        ends = counts.cumsum(0)
        positions = torch.zeros(most, dtype=torch.int64 if wide else torch.int32, device=device)
        at = torch.zeros(most, dtype=bits_dtype(self._tiles.size), device=device)
        tiles, words = (self._tiles.rows, self._tiles.tile_of), found.numel()
        given = *tiles, found, words, ends - counts, most, positions, at
        kind = {"SIZE": self._tiles.size, "OF_BLOCK": BLOCK, "BLOCK": _WORDS}
        launch(collect_kernel, -(-words // _WORDS), device, *given, **kind)
        return positions, at, ends

    def placed(self, listed: Tensor, values: Tensor) -> Tensor:
        """[elements]: the values of listed ones, given by their numbers in the order; 1 for the others."""
        in_order = torch.ones(self._tiles.elements, dtype=values.dtype, device=listed.device)
        in_order[listed] = values
        placed = torch.empty_like(in_order)
        self._tiles.run(place_kernel, self._starts, in_order, placed)
        return placed
