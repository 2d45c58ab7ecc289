"""Reads the nonzeros of a delta in windows, in the order of their positions, so that little memory is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.util.arrays import aligned, overlay_values

#: (positions, bits) of consecutive nonzeros.
Window = tuple[Positions, Array]


def windows_of(tensor: TensorDelta) -> Iterator[Window]:
    """What `positions` and `bits` give, in runs of one nonzero to `WINDOW`; all is checked when the last was taken."""
    return aligned(tensor.position_windows(), tensor.bits_windows())


class Cursor:
    """Reads a delta once, from its first nonzero to its last."""

    def __init__(self, tensor: TensorDelta) -> None:
        self._windows = windows_of(tensor)
        self._ahead: Window | None = None

    @property
    def end(self) -> int | None:
        """The position behind those of the next window; None if nothing is left."""
        if self._ahead is None:
            self._ahead = next(self._windows, None)
        return None if self._ahead is None else int(self._ahead[0][-1]) + 1

    def until(self, stop: int) -> Iterator[Window]:
        """The nonzeros at positions below `stop` that were not read before, in runs."""
        while True:
            if self.end is None or self._ahead is None:
                return
            positions, bits = self._ahead
            count = int(np.searchsorted(positions, stop))
            if count < positions.size:
                self._ahead = positions[count:], bits[count:]
                if count:
                    yield positions[:count], bits[:count]
                return
            self._ahead = None
            yield positions, bits

    def overlay(self, positions: Positions, view: Array) -> None:
        """Puts the delta's own elements into `view`, the elements at `positions`, where it lists one of them.

        Positions increase from call to call, too.
        """
        for own, bits in self.until(int(positions[-1]) + 1):
            first, last = np.searchsorted(positions, (own[0], own[-1] + 1))
            if np.array_equal(own, positions[first:last]):  # mostly so: an undo delta lists what its delta does
                view[first:last] = bits
            else:
                view[first:last] = overlay_values(np, view[first:last], positions[first:last], own, bits)


def side_by_side(tensors: Sequence[TensorDelta]) -> Iterator[list[Window | None]]:
    """Windows of several deltas of one tensor: of each the nonzeros in one range of positions; None if it has none."""
    cursors = [Cursor(tensor) for tensor in tensors]
    while ends := [end for cursor in cursors if (end := cursor.end) is not None]:
        stop = min(ends)  # so no cursor has more than one run
        yield [next(iter(list(cursor.until(stop))), None) for cursor in cursors]
