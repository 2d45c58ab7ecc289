"""Elements of tiles by their cells: tables on the device, and what runs the kernels of `ordered` and `nonzeros`."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.hotswap.bits_there import owners, sent
from shiradelta.hotswap.triton.classed import ALIGNMENT, BLOCK, COLUMNS, PART, STRIP, TOGETHER
from shiradelta.hotswap.triton.nonzeros import collect_kernel, turn_kernel
from shiradelta.hotswap.triton.ordered import count_kernel, select_kernel
from shiradelta.util.arrays import exclusive

Tensor = torch.Tensor
#: Words of bits of a program that goes through nonzeros, and listed elements of one that selects them.
_WORDS, _SELECTED = 1024, 32


class Tiles(NamedTuple):
    """Tiles on a device.

    Attributes:
        rows: int64 [tiles, columns].
        tile_of: int32, the tile of each program.
        lasts: int64, the number of each cell's last count.
        tile_of_cell: int32.
        elements: how many there are.
        counts: how many there are.
        parts: for how many strips and eight groups of them there are counts of parts.
        most_strips: of a tile.
        size: bytes of an element.
        shift: that of all buckets.
        has_lines: whether a tile has classes of rows or columns.
        has_ones: whether tiles have ones of groups.
        has_turned: whether what a tile lists of a group may be no nonzeros.
        is_aligned: whether sizes and addresses of all tiles are multiples of 16.
        kept: what the rows' addresses lead to.
    """

    rows: Tensor
    tile_of: Tensor
    lasts: Tensor
    tile_of_cell: Tensor
    elements: int
    counts: int
    parts: int
    most_strips: int
    size: int
    shift: int
    has_lines: bool
    has_ones: bool
    has_turned: bool
    is_aligned: bool
    kept: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        columns: Mapping[str, np.ndarray | int],
        size: int,
        shift: int,
        kept: Sequence[Tensor],
        *,
        has_lines: bool = False,
        has_turned: bool = False,
    ) -> Tiles:
        """Makes the columns about programs, counts and cells, which follow from sizes and groups.

        Args:
            columns: the others; a number is that of all tiles, and one that is missing is 0.
            size: bytes of an element.
            shift: that of all buckets.
            kept: what addresses in the columns lead to, on the device.
            has_lines: whether a tile has classes of rows or columns.
            has_turned: whether what a tile lists of a group may be no nonzeros.
        """
        device, sizes = kept[0].device, np.asarray(columns["size"], np.int64)
        groups, blocks, strips = np.broadcast_to(columns["groups"], sizes.shape), -(-sizes // BLOCK), -(-sizes // STRIP)
        counts, parts = groups * strips, -(-groups // TOGETHER.value) * strips
        made = {"strips": strips, "program": exclusive(blocks), "start": exclusive(sizes), "cell": exclusive(groups)}
        made |= {"counts": exclusive(counts), "parts": exclusive(parts)}
        every = {**columns, **made}
        rows = np.stack([np.broadcast_to(every.get(name, 0), sizes.shape) for name in COLUMNS], axis=1)
        there = sent(rows.astype(np.int64), device)
        tile_of_cell = owners(groups, device)
        counts_at, strips_of, cell = (there[:, COLUMNS.index(name)] for name in ("counts", "strips", "cell"))
        within = torch.arange(tile_of_cell.numel(), device=device) - cell[tile_of_cell]
        return cls(
            there,
            owners(blocks, device),
            counts_at[tile_of_cell] + (within + 1) * strips_of[tile_of_cell] - 1,
            tile_of_cell,
            int(sizes.sum()),
            int(counts.sum()),
            int(parts.sum()),
            int(strips.max(initial=0)),
            size,
            shift,
            has_lines,
            "ones" in columns,
            has_turned,
            not np.any((sizes | columns["base"]) % ALIGNMENT.value),
            kept,
        )

    def run(self, kernel, *arguments) -> None:
        """Runs a program for each block."""
        kind = {"SIZE": self.size, "LINES": self.has_lines, "ONES": self.has_ones, "ALIGNED": int(self.is_aligned)}
        launch(kernel, self.tile_of.numel(), self.rows.device, self.rows, self.tile_of, *arguments, **kind)


def launch(kernel, programs: int, device: torch.device, *arguments, **kind) -> None:
    """Runs a kernel on a device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **{"BLOCK": BLOCK, **kind})


class Counted:
    """The order of tiles' elements, by counting.

    Attributes:
        sizes: int32, of each cell, how many elements it has.
    """

    def __init__(self, tiles: Tiles) -> None:
        self._tiles, device = tiles, tiles.rows.device
        counts = torch.empty(tiles.counts, dtype=torch.int32, device=device)
        self._parts = torch.empty(tiles.parts, 2 * STRIP // PART, dtype=torch.int32, device=device)
        tiles.run(count_kernel, tiles.shift, counts, self._parts, STRIP, PART)
        self._ends = counts.cumsum(0, dtype=torch.int32)  # which wraps, and the kernel takes differences
        stops = self._ends[tiles.lasts]
        self.sizes = stops.diff(prepend=stops.new_zeros(1))

    def _select(self, cells: Tensor, ranks: Tensor, found: Tensor, values: Tensor | None) -> None:
        """Runs the kernel that finds listed elements; see `select_kernel`."""
        tiles, most = self._tiles, 1 << max(self._tiles.most_strips.bit_length() - 1, 0)
        given = tiles.rows, tiles.tile_of_cell, tiles.shift, cells, ranks, cells.numel()
        given += self._ends, most, self._parts, found
        kind = {"SIZE": tiles.size, "LINES": tiles.has_lines, "ONES": tiles.has_ones}
        kind |= {
            "ALIGNED": 2 * tiles.is_aligned,
            "VALUES": values is not None,
            "STRIP": STRIP,
            "PART": PART,
            "OF_BLOCK": BLOCK,
            "BLOCK": _SELECTED,
        }
        programs = -(-cells.numel() // _SELECTED)
        if programs:
            launch(select_kernel, programs, found.device, *given, found if values is None else values, **kind)

    def nonzeros(self, cells: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """(a bit for each element of each block, int32; int32, how many nonzeros each block has).

        Args:
            cells: int32, of each listed element.
            ranks: int32, its number in its cell.
        """
        tiles, device = self._tiles, self._ends.device
        programs = tiles.tile_of.numel()
        found = torch.zeros(programs * (BLOCK // 32), dtype=torch.int32, device=device)
        self._select(cells, ranks, found, None)
        counts = torch.empty(programs, dtype=torch.int32, device=device)
        tiles.run(turn_kernel, tiles.shift, found.view(torch.uint8), counts, tiles.has_turned)
        return found, counts

    def collect(self, found: Tensor, counts: Tensor, most: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(positions in the tensors, int64 if `wide`, else int32; elements there; how many are up to each block).

        Args:
            found: of `nonzeros`.
            counts: of `nonzeros`.
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

    def placed(self, cells: Tensor, ranks: Tensor, values: Tensor) -> Tensor:
        """[elements]: the values of listed ones, given as for `nonzeros`; 1 for the others."""
        placed = torch.ones(self._tiles.elements, dtype=values.dtype, device=values.device)
        self._select(cells, ranks, placed, values)
        return placed
