"""Runs of elements that steps have set, and one run for several: the last step that sets an element decides.

Few elements of a tensor are merged by sorting.  Many are written to an array of the whole tensor as they come, while
the processor's cache still has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.format.arithmetic import Array, Positions

_MODULUS = 1 << 64
#: Elements of a range of positions that are sorted at a time, about, and the fewest positions of one.
_ELEMENTS, _SPAN = 1 << 16, 1 << 18
#: Up to so many positions of the tensor for each element of its runs, there is a place for every position.
_DENSE = 8
#: Bytes of an element that fits twice into one of NumPy's integers.
_WIDEST = 4
#: Elements that wait at least until they are merged by sorting.
_WAITING = 1 << 21


class Run(NamedTuple):
    """Elements that some consecutive steps have set.

    Attributes:
        positions: sorted.
        bits: the elements afterwards.
        base: the fingerprint of what was at the positions before.
    """

    positions: Positions
    bits: Array
    base: int


def merged(runs: Sequence[Run]) -> Run:
    """One run for several, the earliest first."""
    runs_left = [run for run in runs if run.positions.size]
    if len(runs_left) < 2:
        return runs_left[0] if runs_left else runs[0]
    total = sum(run.positions.size for run in runs_left)
    low, high = min(int(run.positions[0]) for run in runs_left), max(int(run.positions[-1]) for run in runs_left) + 1
    parts = [_by_sorting(some) for some in _ranges(runs_left, low, high, max((high - low) * _ELEMENTS // total, _SPAN))]
    positions, bits = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    return _with_base(positions, bits, sum(map(_gone, runs)))


def _gone(run: Run) -> int:
    """The fingerprint of what a run found, less that of what it left."""
    return run.base - choose().fingerprint(run.positions, run.bits)


def _with_base(positions: Positions, bits: Array, gone: int) -> Run:
    """A run for several, of which these elements are left.

    A step's base_fingerprint is that of what the steps before it gave.  So the sum of all is that of the base and of
    the elements that were set again, which are those of all runs without those that are left in the end.
    """
    return Run(positions, bits, (gone + choose().fingerprint(positions, bits)) % _MODULUS)


def _ranges(runs: Sequence[Run], low: int, high: int, span: int) -> Iterator[list[tuple[Positions, Array]]]:
    """The runs' parts, those that are not empty, in consecutive ranges of positions."""
    edges = np.arange(low, high + span, span)
    cuts = [np.searchsorted(run.positions, edges).tolist() for run in runs]
    for number in range(len(edges) - 1):
        found = []
        for run, cut in zip(runs, cuts, strict=True):
            first, last = cut[number], cut[number + 1]
            if first < last:
                found.append((run.positions[first:last], run.bits[first:last]))
        if found:
            yield found


def _by_sorting(parts: Sequence[tuple[Positions, Array]]) -> tuple[Positions, Array]:
    """(positions, bits after all) of parts, the earliest first."""
    positions, bits = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    order = np.argsort(positions, kind="stable")  # equal ones stay in the order of the steps
    positions, bits = positions[order], bits[order]
    last = np.append(positions[1:] != positions[:-1], True)
    return positions[last], bits[last]


class _Places:
    """Merges runs in an array that has a place for every position of a tensor.

    A place has twice the bits of an element: the lower half is the element, the upper half tells whether one is there.
    """

    def __init__(self, numel: int, runs: Sequence[Run]) -> None:
        self._narrow = runs[0].bits.dtype
        self._there = 1 << 8 * self._narrow.itemsize
        self._places = np.zeros(numel, f"<u{2 * self._narrow.itemsize}")
        self._gone = 0
        for run in runs:
            self.add(run)

    def add(self, run: Run) -> None:
        self._places[run.positions] = run.bits | self._places.dtype.type(self._there)
        self._gone += _gone(run)

    def all(self) -> Run:
        positions = np.flatnonzero(self._places)
        return _with_base(positions, self._places[positions].astype(self._narrow), self._gone)


class Runs:
    """Consecutive runs of a tensor, merged as they come or now and then.

    Runs that wait to be sorted have at most twice as many elements as what is merged already; an array of the tensor is
    made when there is an element for each `_DENSE` of its positions.  So memory is that of a few tensors.

    Args:
        numel: elements of the tensor.
    """

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._merged: Run | None = None
        self._waiting: list[Run] = []
        self._size = 0
        self._places: _Places | None = None

    def add(self, run: Run) -> None:
        """Adds the next run."""
        if self._places is not None:
            self._places.add(run)
            return
        self._waiting.append(run)
        self._size += run.positions.size
        merged_size = 0 if self._merged is None else self._merged.positions.size
        is_dense = (self._size + merged_size) * _DENSE >= self._numel > 0
        if is_dense and run.bits.itemsize <= _WIDEST:
            self._places = _Places(self._numel, self._runs())
            self._merged, self._waiting, self._size = None, [], 0
        elif self._size > max(_WAITING, 2 * merged_size):
            self.all()

    def all(self) -> Run | None:
        """One run for all so far; None if there was none."""
        if self._places is not None:
            return self._places.all()
        if self._waiting:
            self._merged, self._waiting, self._size = merged(self._runs()), [], 0
        return self._merged

    def _runs(self) -> list[Run]:
        return [*([] if self._merged is None else [self._merged]), *self._waiting]
