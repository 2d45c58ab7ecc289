"""Finds a learning rate by short runs from the initial state, on training examples.

A run is a whole one in small, learning-rate schedule included; a rate is as good as the loss that its run leaves on
examples that it has not seen.  Rates go up or down from the first one until the loss gets worse.

A whole run does best at a rate above: on Gemma 3 270M short runs prefer 0.0026, and 200 steps at 0.0026, 0.0064, 0.01
and 0.03 keep 89, 92, 92 and 83 % of a LoRA's gain on code, 90, 93, 93 and 83 % on definitions.  So the next rate is
taken, if its short run helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiradelta.nonzeros.adam import adam_
from shiradelta.nonzeros.schedule import cycle
from shiradelta.train.tuner import Tuner

#: The first learning rate to try, relative to the RMS of each weight, and the factor between neighbours.
FIRST, FACTOR = 0.04, 2.5
#: Rates that are tried at most, in either direction.
MOST = 4
#: Share of the whole run that a short run takes, and its least number of steps.
SHARE, LEAST_STEPS = 0.05, 10
_EPSILON = 1e-8


@dataclass(frozen=True)
class Probe:
    """What a short run gets.

    Attributes:
        tuner: attached, in the state that training starts from.
        units: what a learning rate of 1 is for each of the tuner's parameters.
        loss: gives the loss of a batch of examples.
        steps: batches of examples to step on.
        unseen: batches of examples to measure on.
        clip: norm to which gradients are clipped.
    """

    tuner: Tuner
    units: Sequence[float]
    loss: Callable[[Sequence[int]], Tensor]
    steps: Sequence[Sequence[int]]
    unseen: Sequence[Sequence[int]]
    clip: float

    def best(self, tried: Callable[[float, float], None] = lambda rate, loss: None) -> float:
        """The next learning rate, relative to the units, above the one after whose short run the loss is least.

        Args:
            tried: called with each rate and the loss after its run.
        """
        losses: dict[int, float] = {}

        def loss_at(power: int) -> float:
            if power not in losses:
                losses[power] = self.run(FIRST * FACTOR**power)
                tried(FIRST * FACTOR**power, losses[power])
            return losses[power]

        step = 1 if loss_at(1) < loss_at(0) else -1
        power = max(0, step)
        while abs(power) < MOST and (loss_at(power + step) < losses[power] or math.isinf(losses[power])):
            power += step
        # The rate above was tried, unless the best is the highest of all.
        above = power + 1
        return FIRST * FACTOR ** (above if losses.get(above, math.inf) < self._unseen_loss() else power)

    def run(self, rate: float) -> float:
        """The loss on unseen examples after a short run; infinity if it is not finite.  The tuner is as it was."""
        parameters = self.tuner.parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        try:
            for number, batch in enumerate(self.steps, 1):
                self.loss(batch).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
                self._step(moments, rate * cycle(number - 1, len(self.steps)), number)
            found = self._unseen_loss()
        finally:
            with torch.no_grad():
                for parameter, start in zip(parameters, before, strict=True):
                    parameter.copy_(start)
                    parameter.grad = None
            self.tuner.write()
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def _unseen_loss(self) -> float:
        total = sum(float(self.loss(batch)) * len(batch) for batch in self.unseen)
        return total / sum(map(len, self.unseen))

    @torch.no_grad()
    def _step(self, moments: Sequence[tuple[Tensor, Tensor]], rate: float, number: int) -> None:
        """A step of Adam; torch's own would start pruning."""
        for parameter, unit, (mean, square) in zip(self.tuner.parameters(), self.units, moments, strict=True):
            if parameter.grad is not None:
                adam_(parameter, parameter.grad, mean, square, number, rate, unit, _EPSILON)
                parameter.grad = None
        self.tuner.write()
