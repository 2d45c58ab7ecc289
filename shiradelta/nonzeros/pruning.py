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

    def kept(self, step: int, scores: Sequence[Tensor]) -> list[Tensor]:
        """Masks of what stays after so many steps, one a tensor.

        Args:
            step: optimizer steps that are done.
            scores: what the nonzeros of each tensor matter.
        """
        left = max(0.0, 1 - step / self.until) ** 3
        if self.whole_model:
            first, last = sum(self.begin), sum(self.end)
            everything = largest(torch.cat(list(scores)), last + round((first - last) * left))
            return list(torch.split(everything, [len(score) for score in scores]))
        ends = zip(scores, self.begin, self.end, strict=True)
        return [largest(score, last + round((first - last) * left)) for score, first, last in ends]


def largest(score: Tensor, count: int) -> Tensor:
    """A mask of so many of the largest scores, or of all."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[score.topk(min(count, len(score)), sorted=False).indices] = True
    return kept


def matter(values: Tensor, square: Tensor | None) -> Tensor:
    """What nonzeros matter: |value| times rms gradient, of which `square` is a running mean square, if it is known.

    Where no gradient comes, the largest values matter most.
    """
    return values.abs() if square is None else values.abs() * square.sqrt().clamp(min=1e-30)
