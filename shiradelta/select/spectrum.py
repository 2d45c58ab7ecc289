"""How the magnitudes of a dense delta are distributed: what any number of its largest elements would keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.errors import SourceError
from shiradelta.select.topk import NOT_FINITE, Rows, blocks

#: Magnitudes are told apart by exponent and 7 bits of mantissa, 0.8 %: the upper half of a float32 without its sign.
_CLASSES = 1 << 15
_INFINITY = 0x7F80


@dataclass(frozen=True)
class Spectrum:
    """Nonzero elements by class of magnitude, the largest first.

    Attributes:
        classes: int64 [n], decreasing.
        counts: int64 [n], elements in each.
        numel: elements in all, zeros too.
    """

    classes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    numel: int

    @classmethod
    def of(cls, rows: Rows, shape: tuple[int, int]) -> Spectrum:
        """One pass over a dense delta of (rows, columns).

        Raises:
            SourceError: NaN or infinity in it.
        """
        counts = np.zeros(_CLASSES, np.int64)
        for start, stop in blocks(shape):
            bits = np.ascontiguousarray(rows(start, stop)).reshape(-1).view(np.uint32)
            counts += np.bincount((bits >> 16) & 0x7FFF, minlength=_CLASSES)
        if counts[_INFINITY:].any():
            raise SourceError(NOT_FINITE)
        counts[0] = 0  # zeros, and denormals that bf16 does not have
        classes = np.flatnonzero(counts)[::-1]
        return cls(classes, counts[classes], shape[0] * shape[1])

    @property
    def nonzero(self) -> int:
        """Elements that are not zero."""
        return int(self.counts.sum())

    @property
    def energy(self) -> float:
        """The sum of all squares."""
        return self.energy_beyond(0)

    def energy_beyond(self, k: int) -> float:
        """The sum of the squares of all but the k largest elements, to within a class."""
        middles = ((self.classes << 16) | 0x8000).astype(np.uint32).view(np.float32).astype(np.float64)
        left = np.clip(np.cumsum(self.counts) - k, 0, self.counts)
        return float(left @ np.square(middles))


def allocate(spectra: Mapping[str, Spectrum], k: int) -> dict[str, int]:
    """How many of the k largest elements of all tensors together lie in each.

    Where the limit falls into a class, the class is shared out in proportion.
    """
    total = np.zeros(_CLASSES, np.int64)
    for spectrum in spectra.values():
        total[spectrum.classes] += spectrum.counts
    from_top = np.cumsum(total[::-1])[::-1]
    k = min(k, int(from_top[0]))
    limit = int(np.flatnonzero(from_top >= k)[-1])
    above = int(from_top[limit + 1]) if limit + 1 < _CLASSES else 0
    result: dict[str, int] = {}
    remaining, members = k - above, int(total[limit])
    for name, spectrum in spectra.items():
        here = int(spectrum.counts[spectrum.classes == limit].sum())
        part = round(remaining * here / members) if members else 0
        remaining, members = remaining - part, members - here
        result[name] = int(spectrum.counts[spectrum.classes > limit].sum()) + part
    return result
