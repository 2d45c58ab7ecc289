"""The model that is fitted, with its texts and its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.behaviour import Behaviour
from shiradelta.fit.choices import FitMask
from shiradelta.fit.custom_behaviour import CustomBehaviour
from shiradelta.fit.fit_texts import FitTexts
from shiradelta.fit.fitted import FitJob, FitTarget
from shiradelta.fit.measures import HeldOut
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.fit.tuned_weights import TunedWeights, can_write_exact, dense, write_exact
from shiradelta.models import loading
from shiradelta.models.names import find_names
from shiradelta.nonzeros.weight import flat
from shiradelta.select.largest_torch import largest, largest_of_all
from shiradelta.text.pooling import find_pooling

#: Largest share of the change's energy in tensors that the loaded model lacks, which are not fitted.
MOST_MISSING = 0.1


class Subject:
    """A model to fit, with its texts and its teacher.  Dense deltas are computed on demand, one at a time.

    Attributes:
        model: the base.
        device: the model's device.
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
        self.device = loading.pick_device(fit.device)
        self.micro = fit.per_pass
        if fit.model is not None:
            self.model: nn.Module = fit.model.to(self.device)
        else:
            dtype = loading.pick_dtype(self.device, (target.dtype for target in job.targets))
            self.model = loading.load_model(job.base, job.source, self.device, dtype)
        self.model.eval().requires_grad_(False)
        self.behaviour = self._behaviour(job.base, job.source)
        names = dict(self.model.named_parameters(remove_duplicate=False))
        self.fitted = TunedWeights()
        self.tied: dict[str, str] = {}
        missing = self._match(job, names)
        self._check_missing(job, missing)
        self.warnings = _not_fitted(missing)
        found = find_names({name: delta.shape for name, delta in job.exact}, dict.fromkeys(names)).names
        for name, delta in job.exact:
            own = found.get(name)
            if own is not None and can_write_exact(name, names[own].shape, delta):
                write_exact(flat(names[own]), delta)
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
        tokenizer, pooling = loading.load_tokenizer(base, source), find_pooling(base, source)
        return TextBehaviour(tokenizer, self.texts.every, self.model, fit.tokens, pooling, fit.text_share)

    def _match(self, job: FitJob, names: Mapping[str, nn.Parameter]) -> list[FitTarget]:
        """Finds the targets in the model; returns the missing ones."""
        found = find_names({target.name: None for target in job.targets}, dict.fromkeys(names)).names
        if not found:
            name = job.targets[0].name
            raise SourceError(f"{job.base}: the loaded model has no tensor {name!r}; give model and forward")
        first: dict[nn.Parameter, str] = {}
        for target in job.targets:
            if target.name not in found:
                continue
            weight = names[found[target.name]]
            if weight in self.fitted.tuned:
                self.tied[target.name] = first[weight]
            else:
                first[weight] = target.name
                self.fitted.add(target, weight)
        if not self.fitted.targets:
            raise SourceError(f"{job.source}: nothing in it changes the base")
        return [target for target in job.targets if target.name not in found]

    def _check_missing(self, job: FitJob, missing: Sequence[FitTarget]) -> None:
        """Raises SourceError if the model lacks tensors that carry much of the change."""
        lost = sum(float(dense(target, self.device).square().sum()) for target in missing)
        energy = lost + sum(self.fitted.energy)
        if lost > MOST_MISSING * energy:
            raise SourceError(
                f"{job.base}: it has no tensor {missing[0].name!r} once loaded; what is renamed or stacked on loading"
                f" carries {lost / energy:.0%} of the change, which a fit would not see: convert without fitting"
            )

    def select(self, mask: FitMask, counts: Sequence[int], whole_model: bool = False) -> tuple[list[Tensor], Tensor]:
        """(positions by target, the fine-tune's values there) of the most important weights.

        Args:
            mask: the mask, which defines importance.
            counts: number of weights of each target.
            whole_model: rank the weights of all targets together.
        """
        importance = mask.importance(self)

        def scores(index: int) -> Tensor:
            found: Tensor = importance(index, dense(self.fitted.targets[index], self.device).abs())
            return found

        if whole_model and not mask.by_magnitude:  # counts are distributed by magnitude already
            positions = largest_of_all([scores(index) for index in range(len(counts))], sum(counts))
        else:
            pairs = zip(counts, self.fitted.changed, strict=True)
            positions = [largest(scores(i), min(count, changed)) for i, (count, changed) in enumerate(pairs)]
        pairs_of = zip(self.fitted.targets, positions, strict=True)
        return positions, torch.cat([dense(target, self.device)[at] for target, at in pairs_of])

    @cached_property
    def calibration(self) -> list[list[int]]:
        """The texts of a few batches, by forward pass."""
        return self.texts.calibration(self.behaviour.lengths)

    @cached_property
    def held_out(self) -> HeldOut:
        """Compares the model in its present state with the fine-tune on the held-out texts."""
        return HeldOut(self.model, self.behaviour, self.teacher, self.texts.held_out, self.micro)


def _not_fitted(targets: Sequence[FitTarget]) -> list[str]:
    """The warning of targets that the loaded model lacks."""
    if not targets:
        return []
    these = "1 tensor is" if len(targets) == 1 else f"{len(targets)} tensors are"
    return [
        f"{these} not fitted, because the loaded model has none of that name, such as {targets[0].name!r}; they keep"
        " their largest changes, and the distances do not include them"
    ]
