"""The recipe of a training run by `TrainSettings`: `run` and families of experts train by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.select.shares import parse_sparsity
from shiradelta.text.batches import batches, by_length
from shiradelta.train.attaching import attach, reattach
from shiradelta.train.gradients import Loss
from shiradelta.train.mask_registry import is_searched
from shiradelta.train.masks import MASKS
from shiradelta.train.probe import LEAST_STEPS, SHARE, Probe
from shiradelta.train.run_state import RunState
from shiradelta.train.settings import TrainSettings
from shiradelta.train.targets import find_weights
from shiradelta.train.tuner import Tuner
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress

#: Number of batches over which gradients are summed for a mask.
CALIBRATION = 16
#: The largest number of held-out examples.
HELD_OUT = 256
#: Norm to which gradients are clipped.
CLIP = 1.0


def calibration(settings: TrainSettings, indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Batches of examples to choose a mask by: an epoch at most for a mask that is searched by training.

    Args:
        settings: of the run.
        indices: numbers of the examples to train on.
        lengths: of all examples; batches are of similar ones.
    """
    epoch = min(settings.steps, math.ceil(len(indices) / settings.batch))
    stream = batches(indices, lengths, settings.batch, settings.seed + 1)
    return list(islice(stream, epoch if is_searched(settings.mask) else CALIBRATION))


def attached(
    model: nn.Module,
    loss: Loss,
    settings: TrainSettings,
    indices: Sequence[int],
    lengths: Sequence[int],
    resumed: RunState | None,
    progress: Progress,
) -> Tuner:
    """Attaches to a model for a run by settings.

    Args:
        model: with the base weights.
        loss: loss(model, indices of examples).
        settings: of the run.
        indices: numbers of the examples to train on.
        lengths: of all examples.
        resumed: the state of an interrupted run, whose mask is taken; it is restored by `RunState.restore`.
        progress: called with (what, done, total).
    """
    # A search takes long, and finds more than a mask.
    if resumed is not None and is_searched(settings.mask):
        return reattach(model, resumed.of_tuner, settings.mask)
    targets: list[str] | None = list(settings.targets) or None
    mask: str | dict[str, Tensor] = settings.mask if resumed is None else resumed.mask
    weights = find_weights(model, targets)
    prune_steps, prune_from = settings.pruning
    starting = prune_steps if resumed is None else 0  # a resumed run continues to prune the mask of its state
    tuner = attach(
        model,
        settings.sparsity,
        mask,
        targets,
        calibration(settings, indices, lengths),
        loss=loss,
        scope=settings.scope,
        avoid=settings.avoid,
        seed=settings.seed,
        prune_steps=starting,
        prune_from=prune_from if starting else PRUNE_FROM,
        magnitude=settings.magnitude,
        progress=progress,
    )
    if prune_steps and not starting:
        share, _ = parse_sparsity(settings.sparsity)
        tuner.prune(prune_steps, share, weights.values() if settings.scope == "model" else None)
    return tuner


def optimizer_of(tuner: Tuner, units: Sequence[float], mask: str) -> torch.optim.AdamW:
    """AdamW for a tuner's parameters; each group has the `unit` of its learning rate."""
    return torch.optim.AdamW(
        [{"params": [values], "unit": unit} for values, unit in zip(tuner.parameters(), units, strict=True)],
        weight_decay=MASKS.find(mask).weight_decay,
    )


def find_lr(
    tuner: Tuner,
    units: Sequence[float],
    loss: Callable[[Sequence[int]], Tensor],
    settings: TrainSettings,
    indices: Sequence[int],
    lengths: Sequence[int],
    tried: Callable[[float, float, int], None] = lambda rate, loss, steps: None,
) -> float:
    """The learning rate, relative to the units, that short runs recommend.

    Args:
        tuner: attached, in the state that training starts from.
        units: what a learning rate of 1 is for each of the tuner's parameters.
        loss: of the examples of these numbers.
        settings: of the run.
        indices: numbers of the examples to train on.
        lengths: of all examples.
        tried: called with each rate, the loss after its run, and the run's steps.
    """
    stream = batches(indices, lengths, settings.batch, settings.seed + 2)
    steps = list(islice(stream, max(LEAST_STEPS, round(SHARE * settings.steps))))
    seen = {index for batch in steps for index in batch}
    rest = [index for index in indices if index not in seen] or list(indices)
    unseen = by_length(rest[:HELD_OUT], lengths, settings.batch)
    probe = Probe(tuner, units, loss, steps, unseen, CLIP)
    return probe.best(lambda rate, found: tried(rate, found, len(steps)))


def take_step(
    tuner: Tuner,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    relative_lr: float,
    share: float,
    count: Callable[[], None] = lambda: None,
) -> float:
    """Takes one step, at a share of the relative learning rate.

    Args:
        tuner: what is trained.
        optimizer: its optimizer.
        loss: computes the loss.
        relative_lr: the learning rate, relative to each group's unit.
        share: of it.
        count: called once the step is taken; Ctrl-C comes before both or after both.

    Returns:
        The loss before it; NaN, and no step was taken, where the loss or its gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = relative_lr * group["unit"] * share
    optimizer.zero_grad()
    left = loss()
    left.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(tuner.parameters(), CLIP)
    found = left.item()
    if not math.isfinite(found) or not torch.isfinite(norm):
        return math.nan
    with interrupts_held_back():
        optimizer.step()
        count()
    return found
