"""A mask that training itself finds: the density falls, and what matters least goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shiradelta.errors import DeltaError
from shiradelta.pruning import Descent, matter

if TYPE_CHECKING:
    from .tuner import Tuner


class Falling:
    """Follows an optimizer's steps, and drops what is due.

    What matters is known by the running mean square of the gradients that Adam and its kin keep; with other
    optimizers, values of small magnitude go.  Parameters stay the objects that an optimizer knows, and shrink.

    Attributes:
        step: optimizer steps that are done.
    """

    def __init__(self, descent: Descent) -> None:
        self._descent, self.step = descent, 0

    def after_step(self, tuner: Tuner, optimizer: torch.optim.Optimizer) -> None:
        """Drops what is due after this step.

        Raises:
            DeltaError: the run is of several processes.
        """
        self.step += 1
        if tuner.nnz <= sum(self._descent.end) or not self._descent.is_due(self.step):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise DeltaError(
                "the density cannot fall in a run of several processes, which keep parameters at one size; attach"
                " without fall, or train in one process"
            )
        values = list(tuner.values.values())
        device = values[0].device
        scores = [matter(v.detach(), optimizer.state[v].get("exp_avg_sq")).to(device) for v in values]
        counts = [len(score) for score in scores]
        kept = torch.split(self._descent.kept(self.step, torch.cat(scores), counts), counts)
        for name, own, mask in zip(tuner.values, values, kept, strict=True):
            mask = mask.to(own.device)
            state = optimizer.state[own]
            state.update({key: t[mask] for key, t in state.items() if torch.is_tensor(t) and t.shape == own.shape})
            tuner.keep(name, mask)
