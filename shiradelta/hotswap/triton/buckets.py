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
        has_cuts: whether a threshold cuts any bucket.
        below: the class of keys below the cut.
        above: that of the others.
        cut: the threshold.
    """

    shift: int
    has_cuts: bool
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
        shift, there = _shift(thresholds), sent(thresholds, device)
        has_cuts = bool(np.any(_cuts(thresholds, shift) & (thresholds < KEYS)))
        starts = torch.arange(0, KEYS, 1 << shift, dtype=torch.int32, device=device)
        starts = starts.expand(thresholds.shape[0], starts.numel()).contiguous()
        below, above = (
            torch.searchsorted(there, some, right=True, out_int32=True) for some in (starts, starts + (1 << shift) - 1)
        )
        if not has_cuts:
            return cls(shift, False, below, above, torch.zeros_like(below))
        cut = there.gather(1, below.clamp(max=thresholds.shape[1] - 1).long())
        return cls(shift, True, below, above, torch.where(above > below, cut, 0))

    def packed(self, below: Tensor, above: Tensor) -> Tensor:
        """Int32 [tensors, buckets], as kernels read them: cut, group above, group below.

        Args:
            below: the groups, or the classes, below the cuts.
            above: the others.
        """
        return (self.cut << 16) | (above.int() << 8) | below.int()


def ones_of_groups(groups: Tensor, most: int) -> Tensor:
    """Int64 [tensors, 16 groups, buckets]: a one in the place of each bucket's group, of 4 bits.

    Args:
        groups: integers [tensors, buckets], the group of each bucket, less than `most`.
        most: the most groups of a tensor.
    """
    sixteen = torch.arange(-(-most // 16), device=groups.device)[:, None]
    own = groups.long()[:, None] - 16 * sixteen
    return torch.where((own >= 0) & (own < 16), 1 << (4 * (own & 15)), 0)


def _cuts(thresholds: NDArray[np.int32], shift: int) -> NDArray[np.bool_]:
    """Which thresholds cut a bucket: one at its start does not."""
    found: NDArray[np.bool_] = (thresholds & ((1 << shift) - 1)) != 0
    return found


def _shift(thresholds: NDArray[np.int32]) -> int:
    """The largest with which no bucket is cut twice."""
    first, second = thresholds[:, :-1], thresholds[:, 1:]
    is_pair = (first != second) & (second < KEYS)
    for shift in range(_MOST_SHIFT, 0, -1):
        if not np.any(is_pair & _cuts(first, shift) & (first >> shift == second >> shift)):
            return shift
    return 0
