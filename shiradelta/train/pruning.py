"""Prunes an adapter while it trains, so that training itself finds the mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.models.memory import is_sharded
from shiradelta.nonzeros.pruning import PruningSchedule, importance, is_due
from shiradelta.select.shares import count_for
from shiradelta.train.given import OwnMask
from shiradelta.train.masks import MASKS, can_be_larger
from shiradelta.train.tuned import TunedWeight


def check_pruning(steps: int, begin: float, mask: str | OwnMask | None, pattern: tuple[int, int] | None) -> None:
    """Raises ArgumentError if the pruning settings are impossible, or the mask cannot be pruned."""
    if steps < 1 or not begin > 1:
        raise ArgumentError(
            f"pruning in {steps} steps from {begin:g} x the sparsity is impossible; give 1 step or more, from above 1 x"
        )
    if not can_be_larger(mask, pattern):
        names = ", ".join(name for name in MASKS if MASKS[name].can_be_larger)
        raise ArgumentError(
            f"pruning starts from a mask that can be larger: {names}, by a share; take one of these, or do not prune"
            " (no prune_steps; --prune-from 1)"
        )


class Pruner:
    """Follows an optimizer's steps, and prunes nonzeros when pruning is due.

    Importance is |change| x RMS gradient if the optimizer keeps a running mean square of the gradients, as Adam and its
    variants do, and |change| with other optimizers.  Pruned values stay zero.  Parameters keep their size, because
    training loops, DistributedDataParallel and compiled graphs rely on it.

    Args:
        steps: optimizer steps until the mask is final.
        share: share of each weight left then.
        of: number of elements that `share` is a share of, where nonzeros may move between weights; None otherwise.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, steps: int, share: float, of: int | None) -> None:
        self._steps, self._share, self._of, self.step = steps, share, of, 0

    def after_step(self, tuned: Sequence[TunedWeight], optimizer: torch.optim.Optimizer) -> None:
        """Prunes if it is due after this step, and resets pruned values to zero.

        Raises:
            DeltaError: the optimizer lacks some of the values, or has shards of them.
        """
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(is_sharded(one.values) or id(one.values) not in own for one in tuned):
            raise DeltaError(
                "pruning needs an optimizer that has all values, and has them whole: give them to one, without FSDP or"
                " ZeRO, or attach without prune_steps"
            )
        self.step += 1
        for one in tuned:
            one.nonzeros.follow(one.values)
        if self.step <= self._steps and is_due(self.step, self._steps):
            self._prune(tuned, optimizer)
        with torch.no_grad():
            for one in tuned:
                one.values.masked_fill_(~one.kept, 0)

    def _prune(self, tuned: Sequence[TunedWeight], optimizer: torch.optim.Optimizer) -> None:
        if self._of is None:
            end = [count_for(self._share, one.nonzeros.numel) for one in tuned]
        else:
            end = [count_for(self._share, self._of)]
        schedule = PruningSchedule(self._steps, [one.values.numel() for one in tuned], end, self._of is not None)
        device, scores = tuned[0].values.device, []
        for one in tuned:
            score = importance(one.changes(), optimizer.state.get(one.values, {}).get("exp_avg_sq"))
            scores.append(score.masked_fill(~one.kept, -1).to(device))
        for one, kept in zip(tuned, schedule.kept(self.step, scores), strict=True):
            one.nonzeros.prune(kept.to(one.values.device))
