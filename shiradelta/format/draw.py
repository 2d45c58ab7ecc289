"""Positions drawn from a seed: one in each of the cells that a tensor is cut into (FORMAT.md, 4.8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shiradelta.errors import DeltaError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions, mix
from shiradelta.util.arrays import ranges

if TYPE_CHECKING:
    from shiradelta.format.delta import TensorDelta


@dataclass(frozen=True)
class Draw:
    """A draw of positions from a seed, the same on every machine.

    The elements of a tensor are cut into cells of equal size, up to one element, and one position is drawn in each.  A
    file names the draw that positions are of instead of listing them.

    Args:
        seed: a number below 2^64.
        cells: how many cells there are.
    """

    seed: int
    cells: int

    def is_possible(self, numel: int) -> bool:
        """Whether the format allows the draw in a tensor of `numel` elements; otherwise numbers could overflow."""
        fits = 1 <= self.cells <= min(numel, registry.MAX_CELLS) and -(-numel // self.cells) <= registry.MAX_CELL
        return fits and 0 <= self.seed < 1 << 64

    def at(self, cells: Positions, numel: int) -> Positions:
        """int64, the positions drawn in the given cells of a tensor of `numel` elements, for which it is possible."""
        whole, rest = (np.uint64(number) for number in divmod(numel, self.cells))
        count, half = np.uint64(self.cells), np.uint64(32)
        number = cells.astype(np.uint64)
        start = number * rest
        extra = start // count
        size = whole + (start - extra * count >= count - rest).astype(np.uint64)
        within = (mix(number, np.array([self.seed], np.uint64)) >> half) * size >> half
        positions: Positions = (number * whole + extra + within).view(np.int64)
        return positions

    def windows(self, numel: int) -> Iterator[tuple[int, Positions]]:
        """(number of its first cell, positions) of consecutive runs of at most `WINDOW` cells."""
        for start, stop in ranges(self.cells):
            yield start, self.at(np.arange(start, stop, dtype=np.int64), numel)

    def positions(self, numel: int) -> Positions:
        """int64 [cells], increasing, all positions of the draw."""
        return np.concatenate([drawn for _, drawn in self.windows(numel)])

    def cell_of(self, position: int, numel: int) -> int:
        """The number of the cell that an element is in."""
        return ((position + 1) * self.cells - 1) // numel

    def cells_of(self, positions: Positions, numel: int) -> Positions:
        """int64, the numbers of the cells in which increasing positions were drawn.

        Raises:
            DeltaError: a position is not of this draw.
        """
        found = np.empty(positions.size, np.int64)
        done = 0
        for first, drawn in self.windows(numel) if self.is_possible(numel) else ():
            stop = int(np.searchsorted(positions, drawn[-1], side="right"))
            cells = np.searchsorted(drawn, positions[done:stop])
            if not np.array_equal(drawn[cells], positions[done:stop]):
                break
            found[done:stop], done = first + cells, stop
        if done < positions.size:
            raise DeltaError(f"position {positions[done]} or one after it is not of {self}, which is said to have it")
        return found


def common_draw(deltas: Iterable[TensorDelta]) -> Draw | None:
    """The draw that the positions of all deltas are of, if they say the same one."""
    found = {delta.draw for delta in deltas}
    return found.pop() if len(found) == 1 else None
