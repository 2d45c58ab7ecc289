"""Trains the nonzeros: Adam, a one-cycle learning rate, pruning, and finally the codec's own rounding.

The recipe is the same for LoRA and full fine-tunes.  The unit of the learning rate is the size that the nonzeros would
need to carry the fine-tune's energy alone.  So it depends neither on the model's scale nor on how far it was tuned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shiradelta.errors import DivergedError
from shiradelta.fit.behaviour import Behaviour, Outputs
from shiradelta.fit.fitted import DISTANCE
from shiradelta.fit.measures import HeldOut
from shiradelta.fit.state import FitState
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.tuned_weights import Rounding
from shiradelta.models.recomputation import Recomputation
from shiradelta.nonzeros.adam import adam_
from shiradelta.nonzeros.pruning import PRUNE_UNTIL, PruningSchedule, importance, is_due
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.util.interrupts import interrupts_held_back

#: Share of the steps after which the forward pass uses rounded values; gradients pass straight through.
ROUND_FROM = 0.75
EPSILON = 1e-10
#: The key of the loss beside `DISTANCE`.
LOSS = "loss"
EVALUATIONS = 20
#: Training stops after this many evaluations with less gain than this, counted once values are rounded.
PATIENCE, LEAST_GAIN = 4, 1e-3
#: Training ends after this many NaNs.  Each one halves the learning rate.
FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The plan of a training run.

    Attributes:
        steps: optimizer steps.
        micro: texts per forward pass.
        relative_lr: largest learning rate, relative to `units`.
        quantiser: makes what rounds the values of nonzeros as the file stores them.
        counts: nonzeros by tensor in the end.
        units: unit of the learning rate, by tensor.
        whole_model: whether nonzeros may move between tensors.
        keeps_start: whether the values at the start are the result where no later ones are better.
        mask: the name of the mask that it starts from, which the state remembers.
    """

    steps: int
    micro: int
    relative_lr: float
    quantiser: Callable[[Nonzeros], Rounding]
    counts: Sequence[int]
    units: Sequence[float]
    whole_model: bool
    keeps_start: bool
    mask: str = ""


class FitTrainer:
    """One run of training.

    Args:
        model: the student.
        nonzeros: what is trained.
        behaviour: what is compared.
        teacher: the fine-tune.
        plan: the plan of the run.
        recomputation: makes room where a step runs out of memory; None lets it.

    Attributes:
        state: the current state.
        good: the state at the last evaluation, to which training goes back where it gives NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        nonzeros: Nonzeros,
        behaviour: Behaviour,
        teacher: Teacher,
        plan: TrainingPlan,
        recomputation: Recomputation | None = None,
    ) -> None:
        self._model, self._nonzeros, self._behaviour, self._teacher = model, nonzeros, behaviour, teacher
        self._plan, self._recomputation = plan, recomputation
        self._begin = nonzeros.counts
        self.state = FitState(
            steps=plan.steps,
            step=0,
            counts=nonzeros.counts,
            positions=nonzeros.positions,
            values=nonzeros.values,
            mean=list(map(torch.zeros_like, nonzeros.values)),
            square=list(map(torch.zeros_like, nonzeros.values)),
            mask=plan.mask,
        )
        self.good = self.state
        self._lay_out()

    def load(self, state: FitState) -> None:
        """Resumes from a state."""
        self.state = state = state.copy()
        nonzeros = self._nonzeros
        found = (torch.cat([own.cpu() for own in vectors]) for vectors in (state.positions, state.values))
        nonzeros.reset(*(torch.split(vector, state.counts) for vector in found))
        state.mean, state.square = nonzeros.by_vector(state.mean), nonzeros.by_vector(state.square)
        if state.best_values is not None:
            state.best_values = nonzeros.by_vector(state.best_values)
        self._lay_out()

    def _lay_out(self) -> None:
        """Rebuilds everything that depends on the mask."""
        state, nonzeros = self.state, self._nonzeros
        state.counts, state.positions, state.values = nonzeros.counts, nonzeros.positions, nonzeros.values
        self._units = nonzeros.per_tensor(self._plan.units)
        self._quantiser = self._plan.quantiser(nonzeros)

    def run(
        self,
        batches: Iterator[list[int]],
        held_out: HeldOut,
        progress: Callable[[str, int, int], None],
        save: Callable[[FitState], None],
    ) -> None:
        """Trains to the end, or until the loss stops improving; then the best values are in `Nonzeros`.

        Args:
            batches: texts of each step, from the first step on.
            held_out: for evaluations.
            progress: called with (what, done, total).
            save: called with each state from which a run can go on.

        Raises:
            DivergedError: training gave NaN, although the learning rate was halved.
        """
        plan = self._plan
        every = max(1, plan.steps // EVALUATIONS)
        for _ in range(self.state.step):
            next(batches)
        self.good, text = self.state.copy(), "fitting"
        losses: list[Tensor] = []
        with self._nonzeros.attached(self._model):
            while True:
                with interrupts_held_back():
                    self._prune()
                state = self.state
                end = state.step >= plan.steps
                if end or (state.step % every == 0 and state.step not in (step for step, _ in state.history[-1:])):
                    # Losses are read only here: reading one after each step would make the GPU wait.
                    if losses:
                        left = float(torch.stack(losses).mean())
                        if not math.isfinite(left):
                            self._back_off(self.good)
                            losses.clear()
                            continue
                        losses.clear()
                    self._evaluate(held_out)
                    text = f"fitting, {state.history[-1][1]:.3g} {self._behaviour.measure}"
                    if end or state.waited > PATIENCE:
                        break
                    self.good = state.copy()
                    save(self.good)
                progress(text, state.step, plan.steps)
                losses.append(self.step(next(batches)))
        if self.state.best_values is not None:
            self._nonzeros.values = self.state.best_values
        self.write()

    def resumable(self) -> FitState:
        """The state from which an interrupted run goes on: after the last step, or `good` where that gave NaN."""
        state = self.state
        vectors = [*state.values, *state.mean, *state.square]
        return state if all(bool(own.isfinite().all()) for own in vectors) else self.good

    def measured(self, held_out: HeldOut) -> dict[str, float]:
        """`DISTANCE` from the fine-tune and `LOSS` now, on texts held out."""
        self.write()
        return held_out.mean(self._compare)

    def step(self, batch: list[int]) -> Tensor:
        """Does one optimizer step, within `Nonzeros.attached`; returns the loss before it."""
        loss = self._gradient(batch)
        with interrupts_held_back():
            self._update()
            self.state.step += 1
        return loss

    def write(self) -> None:
        """Writes the values into the weights, rounded from `ROUND_FROM` on."""
        values = self._nonzeros.values
        self._nonzeros.write(self._quantiser(values) if self._rounding else values)

    @property
    def _rounding(self) -> bool:
        step = self.state.step
        return step >= ROUND_FROM * self._plan.steps or (step == 0 and self._plan.keeps_start)

    def _evaluate(self, held_out: HeldOut) -> None:
        measured = self.measured(held_out)
        with interrupts_held_back():
            self._note(measured[DISTANCE], measured[LOSS])

    def _note(self, distance: float, loss: float) -> None:
        """Keeps what was measured, and the values if they are the best."""
        state = self.state
        state.history.append((state.step, distance))
        if not self._rounding:
            return
        gained = loss < state.best * (1 - LEAST_GAIN)
        state.waited = 0 if gained else state.waited + 1
        if loss < state.best:
            state.best, state.best_values = loss, [values.clone() for values in state.values]

    def _compare(self, part: Sequence[int], student: Outputs, teacher: Outputs) -> dict[str, float]:
        distance = self._behaviour.distance(part, student, teacher)  # first: the loss may change the teacher's outputs
        return {DISTANCE: distance, LOSS: float(self._loss(student, teacher, part, 1.0))}

    def _loss(self, student: Outputs, teacher: Outputs, part: Sequence[int], settled: float) -> Tensor:
        target = self._behaviour.target(teacher, part)
        return self._behaviour.loss(part, student, target, self._behaviour.weight(settled))

    def _gradient(self, batch: list[int]) -> Tensor:
        """Puts the gradient of a batch into `Nonzeros.grads`; returns the loss, NaN if the gradient is not finite."""
        passes = partial(self._passes, batch)
        return passes() if self._recomputation is None else self._recomputation.run(passes)

    def _passes(self, batch: list[int]) -> Tensor:
        self._nonzeros.zero_grad()
        self.write()
        total = torch.zeros((), device=self._nonzeros.grads[0].device)
        settled = min(1.0, self.state.step / (PRUNE_UNTIL * self._plan.steps))
        for part in _parts(batch, self._plan.micro):
            teacher = self._teacher.outputs(part)
            student = self._behaviour.outputs(self._model, part)
            loss = self._loss(student, teacher, part, settled) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            self._nonzeros.collect()
            total += loss.detach().to(total.device)
        for grad in self._nonzeros.grads:
            total = torch.where(grad.isfinite().all().to(total.device), total, math.nan)
        return total

    def time_one(self, batch: list[int]) -> float:
        """Measures the seconds that a step takes, without changing anything."""
        start = time.monotonic()
        with self._nonzeros.attached(self._model):
            float(self._gradient(batch))  # waits for a GPU
        return time.monotonic() - start

    def _update(self) -> None:
        """One step of Adam."""
        state = self.state
        lr = self._plan.relative_lr * cycle(state.step, self._plan.steps) / 2**state.failures
        vectors = zip(state.values, self._nonzeros.grads, state.mean, state.square, self._units, strict=True)
        for values, grad, mean, square, units in vectors:
            adam_(values, grad, mean, square, state.step + 1, lr, units, EPSILON)

    def _prune(self) -> None:
        """Prunes the least important nonzeros if it is due."""
        state, plan = self.state, self._plan
        until = plan.steps * PRUNE_UNTIL
        if sum(state.counts) <= sum(plan.counts) or not is_due(state.step, until):
            return
        schedule = PruningSchedule(until, self._begin, plan.counts, plan.whole_model)
        nonzeros = self._nonzeros
        scores = nonzeros.by_tensor([importance(*own) for own in zip(state.values, state.square, strict=True)])
        kept = nonzeros.joined(schedule.kept(state.step, scores))
        nonzeros.keep(kept)
        state.mean = [own[where] for own, where in zip(state.mean, kept, strict=True)]
        state.square = [own[where] for own, where in zip(state.square, kept, strict=True)]
        self._lay_out()

    def _back_off(self, good: FitState) -> None:
        failures = self.state.failures + 1
        if failures > FAILURES:
            self.load(good)
            raise DivergedError(
                f"training gave NaN at step {self.state.step} even at 1/{2 ** (failures - 1)} of the learning rate;"
                f" give a smaller one, such as --fit-relative-lr {self._plan.relative_lr / 16:.2g}"
            )
        self.load(good)
        self.state.failures = good.failures = failures


def _parts(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]
