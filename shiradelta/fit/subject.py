"""The model that is fitted, with its texts and its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.fit.behaviour import Behaviour
from shiradelta.fit.choices import FitMask
from shiradelta.fit.custom_behaviour import CustomBehaviour
from shiradelta.fit.fit_texts import FitTexts
from shiradelta.fit.fitted import FitJob, FitTarget, Fitted
from shiradelta.fit.gain import OLD_DELTA
from shiradelta.fit.measures import HeldOut
from shiradelta.fit.model import model_of
from shiradelta.fit.rounding import write_rounded
from shiradelta.fit.stored import LoadedWeights, group, make_contiguous
from shiradelta.fit.teacher import Teacher, exchanged
from shiradelta.fit.text_behaviour import TextBehaviour, not_run
from shiradelta.fit.tuned_weights import TunedWeights, dense, exact_homes, weights_after, write_exact
from shiradelta.io.recognise import UNCHANGED
from shiradelta.models.placement import main_device
from shiradelta.models.recomputation import Recomputation
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.nonzeros.weight import flat
from shiradelta.select.largest_torch import largest, largest_of_all
from shiradelta.text.pooling import find_pooling

#: Largest share of the change's energy in tensors that the loaded model lacks, which are not fitted.
MOST_MISSING = 0.1


class Subject:
    """A model to fit, with its texts and its teacher.  Dense deltas are computed on demand, one at a time.

    Attributes:
        model: the base.
        devices: where the model is.
        device: the one that decides about precision and pace.
        recomputation: makes room for steps that run out of memory.
        texts: the texts to fit and to measure on.
        behaviour: the outputs that are reproduced.
        fitted: the tensors to fit.
        tied: further names of fitted tensors -> the name under which each is fitted.
        teacher: the fine-tune.
        warnings: warnings for the user.
        micro: texts per forward pass.

    Raises:
        SourceError: the texts or the model cannot be used, or nothing in the fine-tune changes the model.
    """

    def __init__(self, job: FitJob) -> None:
        fit = self._fit = job.fit
        self.texts = FitTexts(fit)
        self.micro = fit.per_pass
        self.model, self.devices = model_of(job)
        self.device = main_device(self.devices)
        self.recomputation = Recomputation(self.model, fit.log)
        make_contiguous(self.model)
        self.behaviour = self._behaviour(job.base, job.source)
        weights = LoadedWeights(self.model)
        self.fitted = TunedWeights()
        missing = self._match(job, weights)
        self._check_missing(job, missing)
        self.warnings = _not_fitted(missing) + ([] if job.fit.forward else not_run(job.base, job.source))
        for name, view, delta in exact_homes(job.exact, weights):
            write_exact(flat(weights.by_name[name]), delta, view)
        self._weights, self._old = weights, job.old
        if job.old is not None:  # the teacher has the old base in the other tensors, too
            self.fitted.tuned = weights_after(job.old.tuned, weights)
        if fit.generate:
            assert isinstance(self.behaviour, TextBehaviour)  # `Fit` refuses `forward`
            with exchanged(self.fitted.tuned):
                self.texts.generate(self.behaviour, self.model, job.progress)
        self.teacher = Teacher(self.model, self.fitted.tuned, self.behaviour)
        # Only texts to fit on, so that held-out texts have no influence.
        with torch.no_grad():
            self.behaviour.calibrate(
                (part, self.behaviour.outputs(self.model, part), self.teacher.outputs(part))
                for part in self.calibration
            )

    def _behaviour(self, base: Path, source: Path) -> Behaviour:
        fit = self._fit
        if fit.model is not None and fit.forward is None and not hasattr(fit.model, "config"):
            raise SourceError("a model that is not one of transformers needs Fit(forward=...), which gives its outputs")
        if fit.forward is not None:
            return CustomBehaviour(self.texts.every, fit.forward, fit.loss)
        processor, pooling = self.texts.processor(base, source), find_pooling(base, source)
        behaviour = self.texts.behaviour(processor, self.model, pooling)
        behaviour.check(self.model, base)
        return behaviour

    def _match(self, job: FitJob, weights: LoadedWeights) -> list[tuple[FitTarget, str]]:
        """Finds the targets in the model; returns the missing ones, and why they are."""
        homes = weights.find({target.name: target.shape for target in job.targets})
        if not homes.found:
            name = job.targets[0].name
            raise SourceError(f"{job.base}: the loaded model has no tensor {name!r}; give model and forward")
        pieces, self.tied = group(job.targets, homes)
        for name, own in pieces.items():
            self.fitted.add(name, weights.by_name[name], own)
        if not self.fitted.targets:
            raise SourceError(f"{job.source}: {UNCHANGED}")
        return [(target, homes.missing[target.name]) for target in job.targets if target.name in homes.missing]

    def _check_missing(self, job: FitJob, missing: Sequence[tuple[FitTarget, str]]) -> None:
        """Raises SourceError if the model lacks tensors that carry much of the change."""
        lost = sum(float(dense(target, self.device).square().sum()) for target, _ in missing)
        energy = lost + sum(self.fitted.energy)
        if lost > MOST_MISSING * energy:
            target, why = missing[0]
            raise SourceError(
                f"{job.base}: {target.name!r} cannot be fitted, because {why}; such tensors carry"
                f" {lost / energy:.0%} of the change, which a fit would not see: convert without fitting"
            )

    def select(
        self, mask: FitMask, counts: Sequence[int], whole_model: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(positions by target, the fine-tune's values there by target) of the most important weights.

        Args:
            mask: the mask, which defines importance.
            counts: number of weights of each target.
            whole_model: rank the weights of all targets together.
        """
        importance, fitted = mask.importance(self), self.fitted

        def scores(index: int) -> Tensor:
            magnitude = dense(fitted.targets[index], fitted.weights[index].device).abs()
            found: Tensor = importance(index, magnitude)
            # Elements that the fine-tune left come last: the file may hold no tensor for them.
            return found.masked_fill(magnitude == 0, -1)

        if whole_model and not mask.by_magnitude:  # counts are distributed by magnitude already
            positions = largest_of_all([scores(index) for index in range(len(counts))], sum(counts))
        else:
            pairs = zip(counts, fitted.changed, strict=True)
            positions = [largest(scores(i), min(count, changed)) for i, (count, changed) in enumerate(pairs)]
        pairs_of = zip(fitted.targets, positions, strict=True)
        return positions, [dense(target, at.device)[at] for target, at in pairs_of]

    def measure_old(self, result: Fitted) -> None:
        """Measures the old base and the old delta, if there are such, while the model is the new base."""
        if self._old is None:
            return
        with exchanged(weights_after(self._old.delta, self._weights)):
            result.note(OLD_DELTA, self.held_out.measures(OLD_DELTA))
        new_base, added = self.held_out.apart(weights_after(self._old.base, self._weights))
        result.note_apart("new_base", new_base)
        result.note_apart("old_delta", added)

    def measure_added(self, result: Fitted, nonzeros: Nonzeros, codec: str) -> None:
        """Measures what the nonzeros add to a new base, while the model has them, rounded by the codec."""

        @contextmanager
        def without() -> Iterator[None]:
            nonzeros.write(None)
            try:
                yield
            finally:
                write_rounded(nonzeros, self.fitted, codec)

        if self._old is not None:
            result.note_apart("fitted", self.held_out.added(without))

    @cached_property
    def calibration(self) -> list[list[int]]:
        """The texts of a few batches, by forward pass."""
        return self.texts.calibration(self.behaviour.lengths)

    @cached_property
    def held_out(self) -> HeldOut:
        """Compares the model in its present state with the fine-tune on the held-out texts."""
        return HeldOut(self.model, self.behaviour, self.teacher, self.texts.held_out, self.micro)


def _not_fitted(missing: Sequence[tuple[FitTarget, str]]) -> list[str]:
    """The warnings of targets that the loaded model lacks, one for each reason."""
    by_reason: dict[str, list[tuple[FitTarget, str]]] = {}
    for target, why in missing:
        by_reason.setdefault(why, []).append((target, why))
    return [
        f"{_count(some)} not fitted, because {why}, such as {some[0][0].name!r}; they keep their largest changes, and"
        " the distances do not include them"
        for why, some in by_reason.items()
    ]


def _count(targets: Sequence[object]) -> str:
    return "1 tensor is" if len(targets) == 1 else f"{len(targets)} tensors are"
