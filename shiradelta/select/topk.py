"""Exact top-k by magnitude of a dense delta, which is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shiradelta.backends.numpy import at_least
from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, Positions
from shiradelta.select.largest import largest
from shiradelta.util.arrays import sum_of_squares

#: rows(start, stop) -> float32 [stop - start, columns]: makes a few rows (`row_shape`) of a dense delta on demand.
Rows = Callable[[int, int], Float32]

NOT_FINITE = "has NaN or infinity in it; repair the source first"
#: Elements made at a time: few enough for a core's cache, enough to hide NumPy's overhead.
_BLOCK_ELEMENTS = 1 << 18
_SAMPLE_BLOCKS = 48
#: Elements sampled together where rows are shorter.
_RUN = 256


@dataclass(frozen=True)
class Selection:
    """The selected elements of one tensor, and the energy of the whole tensor."""

    positions: Positions
    values: Float32
    energy: float  # sum of squares of all elements, selected or not; exact if all are selected


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) in which a dense delta is made.

    A row spans as many trailing dimensions as a block can hold, but never the first dimension.  So a stack of matrices
    (experts) is cut into rows of its matrices, and a vector into elements.
    """
    columns = 1
    for size in shape[:0:-1]:
        if columns > 1 and columns * size > _BLOCK_ELEMENTS:
            break
        columns *= size
    return (math.prod(shape) // columns if columns else 0), columns


def top_k(
    rows: Rows, shape: tuple[int, int], k: int, at_least: Callable[[Float32, float], Positions] = at_least
) -> Selection:
    """The k elements of largest magnitude; the lowest positions among equal ones.  Zeros are never selected.

    Makes two passes over the rows.  The first samples some rows to estimate a magnitude that slightly more than k
    elements reach.  The second collects the elements that reach it, and only those are ordered.  If fewer than k do,
    the second pass is repeated with a lower magnitude.

    Args:
        rows: the dense delta.
        shape: its (rows, columns).
        k: how many elements to select.
        at_least: the backend's function for the indices where |x| >= threshold.

    Raises:
        SourceError: NaN or infinity in the delta.
    """
    count, columns = shape
    if count * columns == 0:
        return Selection(np.zeros(0, np.int64), np.zeros(0, np.float32), 0.0)
    threshold, lower = _sampled_threshold(rows, shape, k) if k else np.float32(np.inf), 0.9
    while True:
        found = [_reaching(rows, start, stop, columns, threshold, at_least) for start, stop in blocks(shape)]
        if threshold == 0 or sum(part.positions.size for part in found) >= k:
            break
        # A little at first: half of a magnitude that few of k elements lack may be reached by a fifth of the tensor.
        threshold = np.float32(threshold * lower) if threshold > 1e-30 else np.float32(0)
        lower = max(lower * lower, 0.5)
    positions = np.concatenate([part.positions for part in found])
    values = np.concatenate([part.values for part in found])
    if threshold == 0 and values.size <= k:  # nothing is left out, so the difference must be exactly zero
        return Selection(positions, values, sum_of_squares(values))
    kept = largest(np.abs(values), k)
    return Selection(positions[kept], values[kept], sum(part.energy for part in found))


def blocks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(first row, last row + 1) of each block of rows that is made at a time; empty for a delta without elements."""
    count, columns = shape
    if not columns:
        return []
    step = max(1, _BLOCK_ELEMENTS // columns)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _reaching(
    rows: Rows,
    start: int,
    stop: int,
    columns: int,
    threshold: np.float32,
    at_least: Callable[[Float32, float], Positions],
) -> Selection:
    """The elements of some rows whose magnitude reaches the threshold, and the energy of these rows."""
    flat = rows(start, stop).reshape(-1)
    energy = sum_of_squares(flat)
    if not math.isfinite(energy):
        raise SourceError(NOT_FINITE)
    at = at_least(flat, float(threshold)) if threshold > 0 else np.flatnonzero(flat)
    return Selection(at + start * columns, flat[at], energy)


def _sampled_threshold(rows: Rows, shape: tuple[int, int], k: int) -> np.float32:
    """A magnitude that slightly more than k elements reach, estimated from evenly spaced rows; 0 takes all."""
    count, columns = shape
    if count * columns <= 4 * _BLOCK_ELEMENTS:
        return np.float32(0)
    run = min(count, -(-_RUN // columns))
    taken = np.linspace(0, count - run, min(count // run, max(_SAMPLE_BLOCKS, (1 << 19) // (run * columns))), dtype=int)
    sample = np.abs(np.concatenate([rows(row, row + run).reshape(-1) for row in taken.tolist()]))
    share = k / (count * columns)
    # Five standard deviations of a binomial, and 5 % because elements of a row resemble each other.
    wanted = 1.05 * share * sample.size + 5 * np.sqrt(share * sample.size) + 8
    if wanted >= sample.size:
        return np.float32(0)
    cut = sample.size - int(wanted)
    return np.float32(np.partition(sample, cut)[cut])
