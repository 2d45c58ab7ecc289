"""Which weights to change: exact top-k by magnitude, without ever holding a dense delta."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shiradelta.backends.numpy import at_least
from shiradelta.errors import DeltaError, SourceError
from shiradelta.format.arithmetic import Float32, Positions

#: rows(start, stop) -> float32 [stop - start, columns]: a dense delta made on demand, a few rows (`row_shape`) at
#: a time.
Rows = Callable[[int, int], Float32]

NOT_FINITE = "has NaN or infinity in it; repair the source first"
#: Elements that are made at a time: small enough for a core's cache, large enough for NumPy's overhead.
_BLOCK_ELEMENTS = 1 << 18
_SAMPLE_BLOCKS = 48
#: Elements that are sampled together, where rows are shorter.
_RUN = 256


@dataclass(frozen=True)
class Selection:
    """The selected elements of one tensor and what they were selected from."""

    positions: Positions
    values: Float32
    energy: float  # sum of the squares of all elements, selected or not; to the last bit if all are selected


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) in which a dense delta is made.

    A row is as many trailing dimensions as a block can hold, so that it is one of a matrix even where many are
    stacked (experts), but never the first one: vectors are cut into elements.
    """
    columns = 1
    for size in shape[:0:-1]:
        if columns > 1 and columns * size > _BLOCK_ELEMENTS:
            break
        columns *= size
    return (math.prod(shape) // columns if columns else 0), columns


def count_for(sparsity: float, numel: int) -> int:
    """k for a share of a tensor's weights: at least one element of a tensor that has some."""
    if not 0 < sparsity <= 1:
        raise DeltaError(f"sparsity {sparsity} is not a share; give a number above 0 and up to 1, such as 0.01")
    return min(numel, max(1, round(sparsity * numel))) if numel else 0


def top_k(
    rows: Rows, shape: tuple[int, int], k: int, at_least: Callable[[Float32, float], Positions] = at_least
) -> Selection:
    """The k elements of largest magnitude; of equal ones those of lowest position.  Zeros are never selected.

    Two passes over the rows: a sample of them tells a magnitude that a little more than k elements reach, the
    second collects those, and only they are ordered.  If the sample was wrong the second is repeated.

    Args:
        rows: the dense delta.
        shape: (rows, columns) of it.
        k: how many.
        at_least: a backend's: indices of |x| >= threshold.

    Raises:
        SourceError: NaN or infinity in the delta.
    """
    count, columns = shape
    if count * columns == 0:
        return Selection(np.zeros(0, np.int64), np.zeros(0, np.float32), 0.0)
    threshold = _sampled_threshold(rows, shape, k) if k else np.float32(np.inf)
    while True:
        found = [_reaching(rows, start, stop, columns, threshold, at_least) for start, stop in blocks(shape)]
        if threshold == 0 or sum(part.positions.size for part in found) >= k:
            break
        threshold = np.float32(threshold / 2) if threshold > 1e-30 else np.float32(0)
    positions = np.concatenate([part.positions for part in found])
    values = np.concatenate([part.values for part in found])
    if threshold == 0 and values.size <= k:  # of nothing that is left out, not even a rounding error is
        return Selection(positions, values, _energy(values))
    kept = _largest(np.abs(values), k)
    return Selection(positions[kept], values[kept], sum(part.energy for part in found))


def blocks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(first row, last row + 1) of what is made at a time; none of a delta without elements."""
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
    """The elements of some rows whose magnitude reaches the threshold, and the energy of all."""
    flat = rows(start, stop).reshape(-1)
    energy = _energy(flat)
    if not math.isfinite(energy):
        raise SourceError(NOT_FINITE)
    at = at_least(flat, float(threshold)) if threshold > 0 else np.flatnonzero(flat)
    return Selection(at + start * columns, flat[at], energy)


def _energy(flat: Float32) -> float:
    """The sum of squares, in float64: finite if all are, and so that small differences of it mean something."""
    wide = flat.astype(np.float64)
    return float(wide @ wide)


def _sampled_threshold(rows: Rows, shape: tuple[int, int], k: int) -> np.float32:
    """A magnitude that a little more than k elements reach, by the look of evenly spaced rows; 0 takes all."""
    count, columns = shape
    if count * columns <= 4 * _BLOCK_ELEMENTS:
        return np.float32(0)
    run = min(count, -(-_RUN // columns))
    taken = np.linspace(0, count - run, min(count // run, max(_SAMPLE_BLOCKS, (1 << 19) // (run * columns))), dtype=int)
    sample = np.abs(np.concatenate([rows(row, row + run).reshape(-1) for row in taken.tolist()]))
    share = k / (count * columns)
    # Five standard deviations of a binomial, and 5 % for rows that are alike within themselves.
    wanted = 1.05 * share * sample.size + 5 * np.sqrt(share * sample.size) + 8
    if wanted >= sample.size:
        return np.float32(0)
    cut = sample.size - int(wanted)
    return np.float32(np.partition(sample, cut)[cut])


def _largest(magnitude: Float32, k: int) -> Positions:
    """Indices, increasing, of the k largest; the earliest of equal ones."""
    if magnitude.size <= k:
        return np.arange(magnitude.size, dtype=np.int64)
    least = np.partition(magnitude, magnitude.size - k)[magnitude.size - k]
    keep = magnitude > least
    ties = np.flatnonzero(magnitude == least)
    keep[ties[: k - int(np.count_nonzero(keep))]] = True
    return np.flatnonzero(keep)
