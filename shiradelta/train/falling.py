"""A mask that training itself finds: the density falls, and what matters least goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shiradelta.errors import DeltaError
from shiradelta.patched import is_spread
from shiradelta.pruning import Descent, matter

from .tuned import Tuned


class Falling:
    """Follows an optimizer's steps, and drops what is due.

    What matters is known by the running mean square of the gradients that Adam and its kin keep; with other
    optimizers, values of small magnitude go.  What is dropped stays zero.  Parameters keep their size, which loops,
    DistributedDataParallel and compiled graphs count on.

    Attributes:
        step: optimizer steps that are done.
    """

    def __init__(self, descent: Descent) -> None:
        self._descent, self.step = descent, 0

    def after_step(self, tuned: Sequence[Tuned], optimizer: torch.optim.Optimizer) -> None:
        """Drops what is due after this step, and undoes what the step did to what was dropped.

        Raises:
            DeltaError: FSDP has given each process a part of the values.
        """
        if any(is_spread(one.values) for one in tuned):
            raise DeltaError("the density cannot fall where FSDP has parts of the values; attach without fall")
        self.step += 1
        for one in tuned:
            one.kept = one.kept.to(one.values.device)
        if sum(one.nnz for one in tuned) > sum(self._descent.end) and self._descent.is_due(self.step):
            self._drop(tuned, optimizer)
        with torch.no_grad():
            for one in tuned:
                one.values.masked_fill_(~one.kept, 0)

    def _drop(self, tuned: Sequence[Tuned], optimizer: torch.optim.Optimizer) -> None:
        device, scores = tuned[0].values.device, []
        for one in tuned:
            score = matter(one.values.detach(), optimizer.state[one.values].get("exp_avg_sq"))
            scores.append(score.masked_fill(~one.kept, -1).to(device))
        counts = [len(score) for score in scores]
        kept = torch.split(self._descent.kept(self.step, torch.cat(scores), counts), counts)
        for one, mask in zip(tuned, kept, strict=True):
            one.kept &= mask.to(one.kept.device)
