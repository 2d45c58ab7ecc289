"""Positions of the k largest numbers, in NumPy; `shiradelta.select.largest_torch` is the same in torch.

Both return positions in increasing order and take everything where there are no more than k numbers.  They differ in
ties: NumPy takes the lowest positions of equal numbers, so that a conversion gives the same file everywhere.  Torch's
`topk` leaves open which of equal numbers it takes; it is the same in each run on one device, which is all that training
and fitting ask for.
"""

from __future__ import annotations

import numpy as np

from shiradelta.format.arithmetic import Float32, Positions


def largest(numbers: Float32, k: int) -> Positions:
    """Positions, increasing, of the k largest; the lowest positions among equal numbers."""
    if numbers.size <= k:
        return np.arange(numbers.size, dtype=np.int64)
    if k == 0:
        return np.zeros(0, np.int64)
    least = np.partition(numbers, numbers.size - k)[numbers.size - k]
    keep = numbers > least
    ties = np.flatnonzero(numbers == least)
    keep[ties[: k - int(np.count_nonzero(keep))]] = True
    return np.flatnonzero(keep)
