"""Trains a family: a base delta on all examples, then an expert on each cluster of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import ArgumentError, DivergedError
from shiradelta.experts.assembling import finish, group_labels, making, measured
from shiradelta.experts.clusters import birch
from shiradelta.experts.family import BASE, ExpertFamily, names_of
from shiradelta.experts.features import DIMS
from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.nonzeros.schedule import cycle
from shiradelta.text.batches import batches
from shiradelta.train.attaching import attach
from shiradelta.train.gradients import Loss
from shiradelta.train.recipe import calibration, find_lr, optimizer_of, take_step
from shiradelta.train.settings import TrainSettings
from shiradelta.train.tuner import Tuner
from shiradelta.util.arguments import ANY, CALL, PATH, WHOLE, ArgumentKind, checked
from shiradelta.util.progress import Progress

_SETTINGS = ArgumentKind("TrainSettings", lambda value: isinstance(value, TrainSettings))


@checked(
    model=ANY,
    examples=ANY,
    loss=CALL,
    out=PATH,
    prompt_loss=CALL,
    experts=WHOLE,
    groups=ANY,
    settings=_SETTINGS,
    expert_steps=WHOLE,
    dims=WHOLE,
)
def train_family(
    model: nn.Module,
    examples: Sequence[Any],
    loss: Loss,
    out: str | os.PathLike[str],
    *,
    prompt_loss: Loss | None = None,
    experts: int = 4,
    groups: Sequence[int] | None = None,
    settings: TrainSettings | None = None,
    expert_steps: int | None = None,
    dims: int = DIMS,
    progress: Progress = lambda what, done, total: None,
) -> ExpertFamily:
    """Trains a family of deltas, and writes its folder.  The model is as before afterwards, bit for bit.

    The base delta is trained on all examples.  Then the gradients of its nonzeros for each example, on the prompt
    alone, are clustered, and an expert is trained on each cluster, from the base delta's values, at its positions.

    Args:
        model: any torch module, with the base weights.
        examples: of any type that the losses take.
        loss: loss(model, list of examples), the mean over them.
        out: the folder to make; there must be none of that name.
        prompt_loss: loss(model, [example]) on the prompt's tokens alone, which is all that is known when a prompt is
            routed; by default `loss`.
        experts: number of clusters, and of experts.
        groups: the number of each example's expert, from 0, where it is known; the examples are not clustered then.
        settings: of the base delta's training; the experts' is the same but for the steps.  `tokens` and `prompt_share`
            have no effect, since the losses are yours.
        expert_steps: optimizer steps of each expert; by default it sees its examples as often as the base delta did.
        dims: dimensions of the projected gradients; 8,192 as in the paper.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an argument is out of range, or the examples do not fall into so many clusters.
        TargetError: the folder cannot be made, or a weight cannot be trained.
        DivergedError: training gave NaN.
        ShiraDeltaError: the gradient of an example is not finite, or zero.
        MissingDependencyError: scikit-learn, which clusters, is not installed.
    """
    for name, given, least in (("experts", experts, 2), ("expert_steps", expert_steps, 1), ("dims", dims, 1)):
        if given is not None and given < least:
            raise ArgumentError(f"{name} is {given}; give {least} or more")
    if len(examples) < experts:
        raise ArgumentError(f"{len(examples)} examples are too few for {experts} experts; give more")
    settings = settings or TrainSettings()
    labels = None if groups is None else group_labels(groups, len(examples), experts)
    with making(Path(out)) as folder:
        training = FamilyTraining(model, examples, loss, settings, progress)
        every = range(len(examples))
        training.base(every, folder / f"{BASE}.shd")
        scales, features = measured(model, folder, examples, prompt_loss or loss, dims, settings.seed, progress)
        if labels is None:
            labels = birch(features, experts)
        for number, name in enumerate(names_of(experts)[1:]):
            own = (labels == number).nonzero()[0].tolist()
            steps = expert_steps or max(1, round(settings.steps * len(own) / len(examples)))
            training.expert(own, steps, folder / f"{BASE}.shd", folder / f"{name}.shd")
        return replace(finish(folder, scales, features, labels, settings.seed), folder=Path(out))


class FamilyTraining:
    """Trains the members of a family, one after the other.

    Args:
        model, examples, loss, settings, progress: as `train_family` takes them.

    Attributes:
        relative_lr: the learning rate; None until the base delta's training has found one.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Any], loss: Loss, settings: TrainSettings, progress: Progress
    ) -> None:
        self.model, self.examples, self.settings, self.progress = model, examples, settings, progress
        self._given_loss = loss
        self._lengths = [0] * len(examples)  # batches need not be of similar length
        self.relative_lr = settings.relative_lr

    def base(self, indices: Sequence[int], path: Path) -> None:
        """Trains the base delta."""
        settings = self.settings
        prune_steps, prune_from = settings.pruning
        with attach(
            self.model,
            settings.sparsity,
            settings.mask,
            list(settings.targets) or None,
            calibration(settings, indices, self._lengths),
            loss=self._loss,
            scope=settings.scope,
            avoid=settings.avoid,
            seed=settings.seed,
            prune_steps=prune_steps,
            prune_from=prune_from if prune_steps else PRUNE_FROM,
            magnitude=settings.magnitude,
            progress=self.progress,
        ) as tuner:
            units = tuner.units()
            if self.relative_lr is None:
                loss = partial(self._loss, self.model)
                self.relative_lr = find_lr(tuner, units, loss, settings, indices, self._lengths)
            self._fit(tuner, units, indices, settings.steps, BASE)
            tuner.save(path, settings.values)

    def expert(self, indices: Sequence[int], steps: int, start: Path, path: Path) -> None:
        """Trains an expert from the base delta's stored values."""
        with attach(self.model, start=start, magnitude=self.settings.magnitude) as tuner:
            self._fit(tuner, tuner.units(), indices, steps, path.stem)
            tuner.save(path, self.settings.values)

    def _fit(self, tuner: Tuner, units: Sequence[float], indices: Sequence[int], steps: int, what: str) -> None:
        assert self.relative_lr is not None
        optimizer = optimizer_of(tuner, units, self.settings.mask)
        stream = batches(indices, self._lengths, self.settings.batch, self.settings.seed)
        for step, batch in enumerate(islice(stream, steps)):
            loss = partial(self._loss, self.model, batch)
            found = take_step(tuner, optimizer, loss, self.relative_lr, cycle(step, steps))
            if math.isnan(found):
                smaller = f"{self.relative_lr / 4:.2g}"
                raise DivergedError(
                    f"training {what} gave NaN at step {step}; give a smaller relative_lr, such as {smaller}"
                )
            self.progress(f"{what}: loss {found:.3f}", step + 1, steps)

    def _loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        return self._given_loss(model, [self.examples[index] for index in indices])
