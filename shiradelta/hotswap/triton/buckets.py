"""Classes of elements as kernels look them up: a table so small that the elements of a warp touch few lines of it."""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.format.codecs.base_classes import KEYS
from shiradelta.hotswap.bits_there import sent

Tensor = torch.Tensor
#: The largest shift: a bucket has the keys of one exponent of bfloat16.
_MOST_SHIFT = 7


class Buckets(NamedTuple):
    """Keys of elements (FORMAT.md, 4.7), so many in a bucket that no more than one threshold cuts it.

    All arrays are int32 [tensors, buckets], on a device.

    Attributes:
        shift: a key's bucket is key >> shift.
        below: the class of keys below the cut.
        above: that of the others.
        cut: the threshold.
    """

    shift: int
    below: Tensor
    above: Tensor
    cut: Tensor

    @classmethod
    def of(cls, thresholds: NDArray[np.int32], device: torch.device) -> Buckets:
        """Those of some tensors.

        Args:
            thresholds: [tensors, any number], not decreasing; none are above all keys.
            device: where to.
        """
        shift = _shift(thresholds)
        there = sent(thresholds, device)
        starts = torch.arange(0, KEYS, 1 << shift, dtype=torch.int32, device=device)
        starts = starts.expand(thresholds.shape[0], starts.numel()).contiguous()
        below, above = (
            torch.searchsorted(there, some, right=True, out_int32=True) for some in (starts, starts + (1 << shift) - 1)
        )
        if not thresholds.shape[1]:
            return cls(shift, below, above, torch.zeros_like(below))
        cut = there.gather(1, below.clamp(max=thresholds.shape[1] - 1).long())
        return cls(shift, below, above, torch.where(above > below, cut, 0))

    def packed(self, below: Tensor, above: Tensor) -> Tensor:
        """Int32 [tensors, buckets], as kernels read them: cut, group above, group below.

        Args:
            below: the groups, or the classes, below the cuts.
            above: the others.
        """
        return (self.cut << 16) | (above.int() << 8) | below.int()


def _shift(thresholds: NDArray[np.int32]) -> int:
    """The largest with which no bucket is cut twice."""
    first, second = thresholds[:, :-1], thresholds[:, 1:]
    is_pair = (first != second) & (second < KEYS)
    for shift in range(_MOST_SHIFT, 0, -1):
        cuts = (first & ((1 << shift) - 1)) != 0  # a threshold at a bucket's start does not cut it
        if not np.any(is_pair & cuts & (first >> shift == second >> shift)):
            return shift
    return 0
