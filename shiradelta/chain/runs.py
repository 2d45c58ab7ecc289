"""Runs of elements that steps have set, and one run for several: the last step that sets an element decides.

Runs are merged a range of positions at a time, so that what is worked on stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.format.arithmetic import Array, Positions

_MODULUS = 1 << 64
#: Positions of a range in which many elements are set, and elements of one in which few are.
_SPAN, _ELEMENTS = 1 << 18, 1 << 16
#: Up to so many positions for each element, a range has a place for every position.
_DENSE = 16
#: Elements that wait at least until they are merged.
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


#: (positions, bits after all steps).
_Merged = tuple[Positions, Array]


def merged(runs: Sequence[Run]) -> Run:
    """One run for several, the earliest first.

    A step's base_fingerprint is that of what the steps before it gave.  So the sum of all is that of the base and of
    the elements that were set again, which are those of all runs without those that are left in the end.
    """
    runs_left = [run for run in runs if run.positions.size]
    if len(runs_left) < 2:
        return runs_left[0] if runs_left else runs[0]
    total = sum(run.positions.size for run in runs_left)
    low, high = min(int(run.positions[0]) for run in runs_left), max(int(run.positions[-1]) for run in runs_left) + 1
    dense = (high - low) <= _DENSE * total
    span = _SPAN if dense else max((high - low) * _ELEMENTS // total, _SPAN)
    work: Callable[[int, Sequence[Run]], _Merged] = _Places(span, runs_left[0].bits.dtype) if dense else _by_sorting
    parts = [work(start, some) for start, some in _ranges(runs_left, low, high, span)]
    positions, bits = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    fingerprint = choose().fingerprint
    base = sum(run.base for run in runs) + fingerprint(positions, bits)
    return Run(positions, bits, (base - sum(fingerprint(run.positions, run.bits) for run in runs_left)) % _MODULUS)


def _ranges(runs: Sequence[Run], low: int, high: int, span: int) -> Iterator[tuple[int, list[Run]]]:
    """(first position, the runs' parts there that are not empty) for consecutive ranges of positions."""
    edges = np.arange(low, high + span, span)
    cuts = [np.searchsorted(run.positions, edges).tolist() for run in runs]
    for number, start in enumerate(edges[:-1].tolist()):
        found = []
        for run, cut in zip(runs, cuts, strict=True):
            first, last = cut[number], cut[number + 1]
            if first < last:
                found.append(Run(run.positions[first:last], run.bits[first:last], 0))
        if found:
            yield start, found


class _Places:
    """Merges runs in an array that has a place for every position of a range."""

    def __init__(self, span: int, dtype: np.dtype[Any]) -> None:
        self._bits, self._known = np.empty(span, dtype), np.empty(span, np.bool_)

    def __call__(self, start: int, runs: Sequence[Run]) -> _Merged:
        bits, known = self._bits, self._known
        known[:] = False
        for run in runs:
            at = run.positions - start
            bits[at] = run.bits
            known[at] = True
        found = np.flatnonzero(known)
        return found + start, bits[found]


def _by_sorting(start: int, runs: Sequence[Run]) -> _Merged:
    """Merges runs of few elements, wherever they are."""
    positions, bits = np.concatenate([run.positions for run in runs]), np.concatenate([run.bits for run in runs])
    order = np.argsort(positions, kind="stable")  # equal ones stay in the order of the steps
    positions, bits = positions[order], bits[order]
    last = np.append(positions[1:] != positions[:-1], True)
    return positions[last], bits[last]


class Runs:
    """Consecutive runs, merged now and then: each element is copied a few times, whatever the number of runs.

    Runs wait until they have twice as many elements as what is merged already, so memory is that of a few tensors.
    """

    def __init__(self) -> None:
        self._merged: Run | None = None
        self._waiting: list[Run] = []
        self._size = 0

    def add(self, run: Run) -> None:
        """Adds the next run."""
        self._waiting.append(run)
        self._size += run.positions.size
        if self._size > max(_WAITING, 0 if self._merged is None else 2 * self._merged.positions.size):
            self.all()

    def all(self) -> Run | None:
        """One run for all so far; None if there was none."""
        if self._waiting:
            self._merged = merged([*([] if self._merged is None else [self._merged]), *self._waiting])
            self._waiting, self._size = [], 0
        return self._merged
