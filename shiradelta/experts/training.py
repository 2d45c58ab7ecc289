"""Trains a family: a base delta on all examples, then an expert on each cluster of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import DivergedError
from shiradelta.experts.assembling import check_numbers, finish, group_labels, making, measured
from shiradelta.experts.clusters import birch, check_clustering
from shiradelta.experts.family import BASE, ExpertFamily, names_of
from shiradelta.experts.features import DIMS
from shiradelta.experts.unfinished import UnfinishedFamily, digest_of
from shiradelta.format.arithmetic import Array
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.text.batches import batches
from shiradelta.train.attaching import attach
from shiradelta.train.gradients import Loss
from shiradelta.train.mask_registry import is_searched
from shiradelta.train.recipe import attached, find_lr, optimizer_of, take_step
from shiradelta.train.run_state import RunState, load_run, save_run
from shiradelta.train.settings import TrainSettings
from shiradelta.train.tuner import Tuner
from shiradelta.util.arguments import ANY, CALL, LIST, PATH, WHOLE, ArgumentKind, checked
from shiradelta.util.progress import Progress

_SETTINGS = ArgumentKind("TrainSettings", lambda value: isinstance(value, TrainSettings))


@checked(
    model=ANY,
    examples=LIST,
    loss=CALL,
    out=PATH,
    prompt_loss=CALL,
    experts=WHOLE,
    groups=ANY,
    settings=_SETTINGS,
    expert_steps=WHOLE,
    dims=WHOLE,
    prompt_batch=WHOLE,
    unfinished=PATH,
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
    prompt_batch: int = 1,
    unfinished: str | os.PathLike[str] | None = None,
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
        prompt_batch: examples whose gradients are taken in one backward pass, each by itself, which is several times
            as fast on a GPU.  `prompt_loss` must then take lists, and be a mean over examples, or over their tokens,
            each of which depends on its own row of the model's inputs alone.
        unfinished: a folder that keeps the state while training, some 20 bytes a nonzero of each member and 4 bytes a
            dimension of each example.  After an interruption the same call goes on from there.  It is deleted when the
            family is written.  Examples that JSON cannot hold are told apart by their number alone.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an argument is out of range, the examples do not fall into so many clusters, or two experts ended
            as the same delta.
        TargetError: the folder cannot be made, or a weight cannot be trained.
        DivergedError: training gave NaN.
        ShiraDeltaError: the gradient of an example is not finite, or zero.
        MissingDependencyError: scikit-learn, which clusters, is not installed.
    """
    check_numbers(len(examples), experts, dims, prompt_batch, expert_steps)
    if groups is None:
        check_clustering()
    settings = settings or TrainSettings()
    labels = None if groups is None else group_labels(groups, len(examples), experts)
    state = None
    if unfinished is not None:
        identity = [digest_of(examples), settings.as_of_0_1()]
        state = UnfinishedFamily(Path(unfinished), identity, lambda line: None)
    training = FamilyTraining(model, examples, loss, settings, progress, state)
    family = training.family(Path(out), prompt_loss or loss, experts, labels, expert_steps, dims, prompt_batch)
    training.finished()
    return family


class FamilyTraining:
    """Trains the members of a family, one after the other.

    Args:
        model, examples, loss, settings, progress: as `train_family` takes them.
        unfinished: where the state is kept; None keeps none.
        check: called with each tuner before it is trained.

    Attributes:
        relative_lr: the learning rate; None until the base delta's training has found one.
        expert_steps: of each expert that `family` has trained.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        loss: Loss,
        settings: TrainSettings,
        progress: Progress,
        unfinished: UnfinishedFamily | None = None,
        check: Callable[[Tuner], None] = lambda tuner: None,
    ) -> None:
        self.model, self.examples, self.settings, self.progress = model, examples, settings, progress
        self.unfinished, self._check = unfinished, check
        self._given_loss = loss
        self._lengths = [0] * len(examples)  # batches need not be of similar length
        self.relative_lr = settings.relative_lr
        self.expert_steps: list[int] = []

    def family(
        self,
        out: Path,
        prompt_loss: Loss,
        experts: int,
        labels: Array | None,
        expert_steps: int | None,
        dims: int,
        prompt_batch: int,
    ) -> ExpertFamily:
        """Trains all members, and writes the folder; arguments and errors are those of `train_family`."""
        settings, unfinished, every = self.settings, self.unfinished, range(len(self.examples))
        with making(out) as folder:
            base = folder / f"{BASE}.shd"
            self.base(every, base)
            found = None if unfinished is None else unfinished.features(dims)
            if found is None:
                given = self.model, folder, self.examples, prompt_loss, dims, settings.seed, self.progress
                found = measured(*given, prompt_batch)
                if unfinished is not None:
                    unfinished.keep_features(dims, *found)
            scales, features = found
            if labels is None:
                labels = birch(features, experts)
            for number, name in enumerate(names_of(experts)[1:]):
                own = (labels == number).nonzero()[0].tolist()
                steps = expert_steps or max(1, round(settings.steps * len(own) / len(every)))
                self.expert_steps.append(steps)
                self.expert(own, steps, base, folder / f"{name}.shd")
            return replace(finish(folder, scales, features, labels, settings.seed), folder=out)

    def finished(self) -> None:
        """Deletes the state."""
        if self.unfinished is not None:
            self.unfinished.remove()

    @property
    def state(self) -> Path | None:
        """The folder of the state."""
        return None if self.unfinished is None else self.unfinished.folder

    def base(self, indices: Sequence[int], path: Path) -> None:
        """Trains the base delta, or another one of the same settings, which is named as the file."""
        settings, kept = self.settings, self._kept(path.stem, self.settings.steps)
        resumed = None if kept is None else load_run(kept, lambda line: None)
        if resumed is not None and resumed.relative_lr is not None:
            self.relative_lr = resumed.relative_lr
        with attached(self.model, self._loss, settings, indices, self._lengths, resumed, self.progress) as tuner:
            self._check(tuner)
            if kept is not None and resumed is None and is_searched(settings.mask):
                save_run(kept, tuner, None, 0, [], None, None)
            if self.relative_lr is None:
                loss = partial(self._loss, self.model)
                self.relative_lr = find_lr(tuner, tuner.units(), loss, settings, indices, self._lengths)
            self._fit(tuner, indices, settings.steps, path.stem, kept, resumed)
            tuner.save(path, settings.values)

    def expert(self, indices: Sequence[int], steps: int, start: Path, path: Path) -> None:
        """Trains an expert from the base delta's stored values."""
        kept = self._kept(path.stem, list(indices), steps)
        resumed = None if kept is None else load_run(kept, lambda line: None)
        with attach(self.model, start=start, magnitude=self.settings.magnitude) as tuner:
            self._fit(tuner, indices, steps, path.stem, kept, resumed)
            tuner.save(path, self.settings.values)

    def _kept(self, name: str, *inputs: object) -> UnfinishedRun | None:
        return None if self.unfinished is None else self.unfinished.run(name, *inputs)

    def _fit(
        self,
        tuner: Tuner,
        indices: Sequence[int],
        steps: int,
        what: str,
        kept: UnfinishedRun | None,
        resumed: RunState | None,
    ) -> None:
        assert self.relative_lr is not None
        optimizer = optimizer_of(tuner, tuner.units(), self.settings.mask)
        first = 0
        if kept is not None and resumed is not None:
            resumed.restore(tuner, optimizer, Path("the model"), kept.path)
            first = resumed.step
            if self.unfinished is not None:
                self.unfinished.log(f"{what}: going on from step {first} of {steps}, found in {kept.path}")
        stream = batches(indices, self._lengths, self.settings.batch, self.settings.seed)
        for step, batch in islice(enumerate(stream), first, steps):
            if kept is not None and kept.is_due():
                save_run(kept, tuner, optimizer, step, [], None, self.relative_lr)
            loss = partial(self._loss, self.model, batch)
            found = take_step(tuner, optimizer, loss, self.relative_lr, cycle(step, steps))
            if math.isnan(found):
                smaller = f"{self.relative_lr / 4:.2g}"
                raise DivergedError(
                    f"training {what} gave NaN at step {step}; give a smaller relative_lr= or --relative-lr, such as"
                    f" {smaller}"
                )
            self.progress(f"{what}: loss {found:.3f}", step + 1, steps)
        if kept is not None and first < steps:
            save_run(kept, tuner, optimizer, steps, [], None, self.relative_lr)

    def _loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        return self._given_loss(model, [self.examples[index] for index in indices])
