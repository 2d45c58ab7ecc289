"""Which weights to change: exact top-k by magnitude, without ever holding a dense delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from shiradelta.arithmetic import Float32, Positions
from shiradelta.errors import DeltaError, SourceError
from shiradelta.reference import at_least

#: rows(start, stop) -> float32 [stop - start, columns]: a dense delta made on demand, a few rows (`row_shape`) at
#: a time.
Rows = Callable[[int, int], Float32]

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
    energy: float  # sum of the squares of all elements, selected or not


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
        found = [_reaching(rows, start, stop, columns, threshold, at_least) for start, stop in _blocks(shape)]
        if threshold == 0 or sum(part.positions.size for part in found) >= k:
            break
        threshold = np.float32(threshold / 2) if threshold > 1e-30 else np.float32(0)
    positions = np.concatenate([part.positions for part in found])
    values = np.concatenate([part.values for part in found])
    kept = _largest(np.abs(values), k)
    return Selection(positions[kept], values[kept], sum(part.energy for part in found))


def _blocks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    count, columns = shape
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
    energy = float(np.dot(flat, flat))
    if not np.isfinite(energy):
        if not np.all(np.isfinite(flat)):
            raise SourceError("has NaN or infinity in it; repair the source first")
        energy = float(np.square(flat, dtype=np.float64).sum())
    at = at_least(flat, float(threshold)) if threshold > 0 else np.flatnonzero(flat)
    return Selection(at + start * columns, flat[at], energy)


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


def allocate(tensors: Mapping[str, tuple[Callable[[], Rows], tuple[int, int]]], k: int) -> dict[str, int]:
    """How many of the k largest elements of all tensors together lie in each.

    Magnitudes are told apart by 15 bits (exponent and 7 bits of mantissa, 0.8 %); where the limit falls into one
    such class, the class is shared out in proportion.
    """
    classes = 1 << 15
    histograms: dict[str, dict[int, int]] = {}
    total = np.zeros(classes, np.int64)
    for name, (opened, shape) in tensors.items():
        rows = opened()
        counts = np.zeros(classes, np.int64)
        for start, stop in _blocks(shape) if shape[0] * shape[1] else []:
            magnitude_class = (rows(start, stop).reshape(-1).view(np.uint32) >> 16) & 0x7FFF
            counts += np.bincount(magnitude_class, minlength=classes)
        counts[0] = 0  # zeros, and denormals that bf16 does not have
        total += counts
        histograms[name] = {int(c): int(counts[c]) for c in np.flatnonzero(counts)}
    from_top = np.cumsum(total[::-1])[::-1]
    k = min(k, int(from_top[0]))
    limit = int(np.flatnonzero(from_top >= k)[-1])
    above = int(from_top[limit + 1]) if limit + 1 < classes else 0
    result: dict[str, int] = {}
    remaining, members = k - above, int(total[limit])
    for name, histogram in histograms.items():
        here = histogram.get(limit, 0)
        part = round(remaining * here / members) if members else 0
        remaining, members = remaining - part, members - here
        result[name] = sum(n for c, n in histogram.items() if c > limit) + part
    return result
