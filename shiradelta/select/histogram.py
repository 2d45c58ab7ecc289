"""Histograms of magnitudes, and how many of the largest elements of a whole model each tensor holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: A class is an exponent and 7 bits of mantissa (0.8 %): the upper 16 bits of a float32 >= 0.
CLASSES = 1 << 15


@dataclass(frozen=True)
class Histogram:
    """Elements by class of magnitude; classes without elements are left out.

    Attributes:
        classes: int64 [n], decreasing.
        counts: int64 [n], elements in each.
    """

    classes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of_counts(cls, counts: npt.NDArray[np.int64]) -> Histogram:
        """Makes a histogram of the number of elements in each class, int64 [CLASSES]."""
        classes = np.flatnonzero(counts)[::-1]
        return cls(classes, counts[classes])


def allocate(histograms: Mapping[str, Histogram], k: int) -> dict[str, int]:
    """Counts how many of the k largest elements of all tensors lie in each tensor.

    The class at the limit is divided in proportion.
    """
    total = np.zeros(CLASSES, np.int64)
    for histogram in histograms.values():
        total[histogram.classes] += histogram.counts
    from_top = np.cumsum(total[::-1])[::-1]
    k = min(k, int(from_top[0]))
    limit = int(np.flatnonzero(from_top >= k)[-1])
    above = int(from_top[limit + 1]) if limit + 1 < CLASSES else 0
    result: dict[str, int] = {}
    remaining, members = k - above, int(total[limit])
    for name, histogram in histograms.items():
        here = int(histogram.counts[histogram.classes == limit].sum())
        part = round(remaining * here / members) if members else 0
        remaining, members = remaining - part, members - here
        result[name] = int(histogram.counts[histogram.classes > limit].sum()) + part
    return result
