"""Density that falls while values are trained: when something goes, how much, and what.

The number that is left follows a cubic (Zhu and Gupta, arXiv:1710.01878, section 3): fast at first, when much does not
matter, and slowly where it hurts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: At this multiple of what is kept it begins: more costs memory and gives the mask less time to settle.
BEGIN = 5
#: Of all steps, those in which it falls; then the mask is fixed.
FALL_UNTIL = 0.6
PRUNINGS = 24


def is_due(step: int, until: float) -> bool:
    """Whether something is to go after so many steps of a fall that ends after `until`."""
    return step > 0 and (step >= until or step % max(1, int(until) // PRUNINGS) == 0)


@dataclass(frozen=True)
class Descent:
    """From many nonzeros to few.

    Attributes:
        until: steps in which the density falls.
        begin, end: nonzeros by tensor, before and after.
        whole_model: they may move between tensors, so that the sums alone count.
    """

    until: float
    begin: Sequence[int]
    end: Sequence[int]
    whole_model: bool

    def kept(self, step: int, score: Tensor, counts: Sequence[int]) -> Tensor:
        """A mask of what stays after so many steps.

        Args:
            step: optimizer steps that are done.
            score: what each nonzero matters [n], tensor after tensor.
            counts: nonzeros of each tensor.
        """
        left = max(0.0, 1 - step / self.until) ** 3
        if self.whole_model:
            first, last = sum(self.begin), sum(self.end)
            return largest(score, torch.zeros_like(score, dtype=torch.int64), [last + round((first - last) * left)])
        wanted = [last + round((first - last) * left) for first, last in zip(self.begin, self.end, strict=True)]
        lengths = torch.tensor(counts, device=score.device)
        return largest(score, torch.arange(len(counts), device=score.device).repeat_interleave(lengths), wanted)


def largest(score: Tensor, group: Tensor, counts: Sequence[int]) -> Tensor:
    """A mask of the largest scores of each group; groups lie one after the other.  All groups at once."""
    order = score.argsort(descending=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=len(counts))
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(score), device=score.device) - first[group[order]]
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[order[rank < torch.tensor(counts, device=score.device)[group[order]]]] = True
    return kept


def matter(values: Tensor, square: Tensor | None) -> Tensor:
    """What nonzeros matter: |value| times rms gradient, of which `square` is a running mean square, if it is known.

    Where no gradient comes, the largest values matter most.
    """
    return values.abs() if square is None else values.abs() * square.sqrt().clamp(min=1e-30)
