"""The contributions of several deltas to one tensor, aligned by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.format.arithmetic import Float32, Positions
from shiradelta.util.arrays import merge_sorted


@dataclass(frozen=True)
class Overlay:
    """The contributions of several deltas to one tensor, aligned by position.

    Inputs are in the order in which contributions are summed.  An input without the tensor has no nonzeros here.

    Attributes:
        positions: sorted union of the inputs' positions.
        shared: for each of them, whether several inputs list it.
        at: for each input, the indices of its nonzeros in `positions`.
        values: for each input, the values that it adds, strength included.
        strengths: the strength of each input.
    """

    positions: Positions
    shared: npt.NDArray[np.bool_]
    at: tuple[Positions, ...]
    values: tuple[Float32, ...]
    strengths: tuple[float, ...] = ()

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return len(self.at)

    @property
    def nonzeros(self) -> int:
        """Nonzeros of all inputs together."""
        return sum(values.size for values in self.values)

    def counts(self) -> Positions:
        """For each position, the number of inputs that list it."""
        counts = np.zeros(self.positions.size, np.int64)
        for at in self.at:
            counts[at] += 1
        return counts

    def sum(self, keep: Callable[[Positions, Float32], npt.NDArray[np.bool_]] | None = None) -> Float32:
        """For each position, the float32 sum of its contributions in order; 0 where none is kept.

        Args:
            keep: (indices in `positions`, values) of one input -> mask of the nonzeros to take; None takes all.
        """
        total = np.zeros(self.positions.size, np.float32)
        begun = np.zeros(self.positions.size, bool)
        for at, values in zip(self.at, self.values, strict=True):
            if keep is not None:
                kept = keep(at, values)
                at, values = at[kept], values[kept]
            # Most positions are listed once, so only the shared ones are looked up.
            meets = self.shared[at]
            again, more = at[meets], values[meets]
            # The first contribution is not added to 0: 0 + -0 would lose its sign.
            so_far = np.where(begun[again], total[again] + more, more)
            total[at] = values
            total[again] = so_far
            begun[again] = True
        return total

    def meetings(self) -> tuple[int, int]:
        """(number of positions that several inputs list, number of these with opposite signs)."""
        up, down = (np.zeros(self.positions.size, bool) for _ in range(2))
        for at, values in zip(self.at, self.values, strict=True):
            meets = self.shared[at]
            up[at[meets]] |= values[meets] > 0
            down[at[meets]] |= values[meets] < 0
        return int(np.count_nonzero(self.shared)), int(np.count_nonzero(up & down))


def overlay(parts: Sequence[tuple[Positions, Float32]], strengths: Sequence[float] = ()) -> Overlay:
    """Aligns the inputs' sorted positions and their values, which have these strengths."""
    merged = merge_sorted([positions for positions, _ in parts])
    return Overlay(
        merged.union, merged.shared(), tuple(merged.indices), tuple(values for _, values in parts), tuple(strengths)
    )
