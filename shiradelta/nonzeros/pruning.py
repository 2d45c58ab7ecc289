"""Pruning while values are trained: when nonzeros are removed, how many, and which.

The density follows a cubic (Zhu and Gupta, arXiv:1710.01878, section 3).  It decreases fast at first, while most
nonzeros are unimportant, and slowly towards the end, when each removal costs accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shiradelta.select.largest_torch import largest_mask, largest_masks

#: Training starts with this many times the nonzeros that are kept.  More would cost memory, and leave the mask less
#: time to settle.
PRUNE_FROM = 5
#: Share of all training steps during which nonzeros are pruned; then the mask is final.
PRUNE_UNTIL = 0.6
#: How often nonzeros are pruned.
PRUNINGS = 24


def is_due(step: int, until: float) -> bool:
    """Whether to prune after `step` steps, if pruning ends after `until`."""
    return step > 0 and (step >= until or step % max(1, int(until) // PRUNINGS) == 0)


@dataclass(frozen=True)
class PruningSchedule:
    """How many nonzeros to keep after each step, and which.

    Attributes:
        until: step after which the final number is reached.
        begin, end: nonzeros by tensor, before and after.
        whole_model: rank the nonzeros of all tensors together; only the sums of `begin` and `end` hold then.
    """

    until: float
    begin: Sequence[int]
    end: Sequence[int]
    whole_model: bool

    def kept(self, step: int, scores: Sequence[Tensor]) -> list[Tensor]:
        """Bool masks of the nonzeros to keep after `step` steps, one per tensor.

        Args:
            step: optimizer steps done.
            scores: importance of each nonzero, by tensor.
        """
        left = max(0.0, 1 - step / self.until) ** 3
        if self.whole_model:
            first, last = sum(self.begin), sum(self.end)
            return largest_masks(scores, last + round((first - last) * left))
        ends = zip(scores, self.begin, self.end, strict=True)
        return [largest_mask(score, last + round((first - last) * left)) for score, first, last in ends]


def importance(values: Tensor, square: Tensor | None) -> Tensor:
    """Importance of each nonzero: |value| times the RMS gradient.

    Args:
        values: of the nonzeros.
        square: running mean square of their gradients; None if unknown, which leaves |value|.
    """
    # The RMS has a lower limit, so that magnitude decides among nonzeros without a gradient.
    return values.abs() if square is None else values.abs() * square.sqrt().clamp(min=1e-30)
