"""A mask that training itself finds: the density falls, and what matters least goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shiradelta.errors import DeltaError
from shiradelta.nonzeros.pruning import PruningSchedule, importance, is_due
from shiradelta.nonzeros.weight import is_sharded
from shiradelta.select.shares import count_for
from shiradelta.train import masks
from shiradelta.train.choose import OwnMask
from shiradelta.train.tuned import Tuned


def check_fall(steps: int, begin: float, mask: str | OwnMask | None, pattern: tuple[int, int] | None) -> None:
    """Raises DeltaError if the density cannot fall so, or not from such a mask."""
    if steps < 1 or not begin > 1:
        raise DeltaError(f"a fall in {steps} steps from {begin:g} x is none; give 1 step or more, from above 1 x")
    if not masks.can_be_larger(mask, pattern):
        raise DeltaError(
            "the density falls from a mask that can be larger: snip, grad, wm or rand, by a share; take one of these,"
            " or let it stay (no fall; --fall-from 1)"
        )


class Falling:
    """Follows an optimizer's steps, and drops what is due.

    What matters is known by the running mean square of the gradients that Adam and its kin keep; with other
    optimizers, values of small magnitude go.  What is dropped stays zero.  Parameters keep their size, which loops,
    DistributedDataParallel and compiled graphs count on.

    Args:
        steps: optimizer steps until the mask is final.
        share: of each weight that is left then.
        of: the elements that it is a share of, where nonzeros may move between weights.

    Attributes:
        step: optimizer steps that are done.
    """

    def __init__(self, steps: int, share: float, of: int | None) -> None:
        self._steps, self._share, self._of, self.step = steps, share, of, 0

    def after_step(self, tuned: Sequence[Tuned], optimizer: torch.optim.Optimizer) -> None:
        """Drops what is due after this step, and undoes what the step did to what was dropped.

        Raises:
            DeltaError: the optimizer has not all of the values, or not whole ones.
        """
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(is_sharded(one.values) or id(one.values) not in own for one in tuned):
            raise DeltaError(
                "the density cannot fall where an optimizer has not all of the values, whole: give them to one, without"
                " FSDP or ZeRO, or attach without fall"
            )
        self.step += 1
        for one in tuned:
            one.nonzeros.follow(one.values)
        if self.step <= self._steps and is_due(self.step, self._steps):
            self._drop(tuned, optimizer)
        with torch.no_grad():
            for one in tuned:
                one.values.masked_fill_(~one.kept, 0)

    def _drop(self, tuned: Sequence[Tuned], optimizer: torch.optim.Optimizer) -> None:
        if self._of is None:
            end = [count_for(self._share, one.nonzeros.numel) for one in tuned]
        else:
            end = [count_for(self._share, self._of)]
        schedule = PruningSchedule(self._steps, [one.values.numel() for one in tuned], end, self._of is not None)
        device, scores = tuned[0].values.device, []
        for one in tuned:
            score = importance(one.values.detach(), optimizer.state.get(one.values, {}).get("exp_avg_sq"))
            scores.append(score.masked_fill(~one.kept, -1).to(device))
        for one, kept in zip(tuned, schedule.kept(self.step, scores), strict=True):
            one.nonzeros.prune(kept.to(one.values.device))
