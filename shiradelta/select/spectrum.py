"""Histogram of a dense delta's magnitudes: the energy that any number of its largest elements would keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.select.histogram import CLASSES, Histogram
from shiradelta.select.topk import NOT_FINITE, Rows, blocks

_INFINITY = 0x7F80


@dataclass(frozen=True)
class Spectrum(Histogram):
    """Nonzero elements of one tensor by class of magnitude.

    Attributes:
        numel: all elements, zeros included.
    """

    numel: int

    @classmethod
    def of(cls, rows: Rows, shape: tuple[int, int]) -> Spectrum:
        """The spectrum of a dense delta of shape (rows, columns), in one pass.

        Raises:
            SourceError: the delta has NaN or infinity in it.
        """
        counts = np.zeros(CLASSES, np.int64)
        for start, stop in blocks(shape):
            bits = np.ascontiguousarray(rows(start, stop)).reshape(-1).view(np.uint32)
            counts += np.bincount((bits >> 16) & 0x7FFF, minlength=CLASSES)
        if counts[_INFINITY:].any():
            raise SourceError(NOT_FINITE)
        counts[0] = 0  # zeros, and denormals that bf16 does not have
        found = Histogram.of_counts(counts)
        return cls(found.classes, found.counts, shape[0] * shape[1])

    @property
    def nonzero(self) -> int:
        """Elements that are not zero."""
        return int(self.counts.sum())

    @property
    def energy(self) -> float:
        """The sum of all squares."""
        return self.energy_beyond(0)

    def energy_beyond(self, k: int) -> float:
        """The sum of the squares of all but the k largest elements; exact to within a class."""
        middles = ((self.classes << 16) | 0x8000).astype(np.uint32).view(np.float32).astype(np.float64)
        left = np.clip(np.cumsum(self.counts) - k, 0, self.counts)
        return float(left @ np.square(middles))
