"""Chooses the positions to train in each weight, by a mask's name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.draw import Draw
from shiradelta.models.views import View
from shiradelta.select.histogram import CLASSES, Histogram, allocate
from shiradelta.select.largest_torch import largest, largest_of_groups
from shiradelta.select.shares import count_for, exact_count_for
from shiradelta.train.gradients import Loss, sums
from shiradelta.train.masks import Chosen, Mask, MaskInput, find_mask
from shiradelta.train.tuned import check_draws
from shiradelta.util.progress import Progress


def matrix_shape(model: nn.Module, name: str, weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight; a convolution's is that of a matrix [out, everything else]."""
    shape = tuple(weight.shape)
    module = model.get_submodule(name.rpartition(".")[0])
    return (shape[0], math.prod(shape[1:])) if isinstance(module, _Convolution) and len(shape) > 1 else shape


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The weights to choose from, and how much to choose.

    Attributes:
        model: the whole model.
        weights: the weights to choose from, by name.
        views: the checkpoint's views of the weights, by name.
        share: share of each weight, or of all weights together.
        pattern: (n, m) to choose n of every m elements instead.
        whole_model: whether the share is that of all weights together.
        avoid: positions by weight that must not be chosen, increasing.
        seed: for masks that are random.
        batches: calibration batches, for masks that need gradients.
        loss: loss(model, batch).
        progress: called with (what, done, total).
        all_needed: whether it is an error if the loss does not depend on a weight; else the weight is left out.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    views: Mapping[str, Sequence[View]]
    share: float
    pattern: tuple[int, int] | None
    whole_model: bool
    avoid: Mapping[str, Positions]
    seed: int
    batches: Sequence[Any]
    loss: Loss
    progress: Progress
    all_needed: bool

    def by_name(self, name: str) -> tuple[dict[str, Tensor], dict[str, Draw]]:
        """What a mask chooses.

        Returns:
            (positions by weight, int64, increasing, on the weight's device; the draws that they are of, if there are
            any, by the checkpoint's names).

        Raises:
            ArgumentError: the mask is unknown or lacks a capability, or the share of a weight rounds to no element.
        """
        mask = find_mask(name, self.pattern, self.whole_model)
        if not self.whole_model and self.pattern is None:
            for weight_name, weight in self.weights.items():
                exact_count_for(self.share, weight.numel(), weight_name)
        chosen: dict[str, Tensor] = {}
        draws: dict[str, Draw] = {}
        if mask.positions is not None and self.pattern is None:
            for weight_name, given in self._inputs(mask):
                found = mask.positions(given)
                of_draws = found.draws if isinstance(found, Chosen) else {}
                found = found.positions if isinstance(found, Chosen) else found
                chosen[weight_name] = _checked_positions(mask, given, weight_name, found)
                try:
                    check_draws(of_draws, given.views, chosen[weight_name].cpu().numpy())
                except DeltaError as error:
                    raise ArgumentError(f"mask {mask.name!r} names a wrong draw: {error}; mend its function") from None
                draws |= of_draws
            return chosen, draws
        counts = self._counts(mask) if self.whole_model else {}
        for weight_name, scores in self._scores(mask):
            if self.pattern is not None:
                shape = matrix_shape(self.model, weight_name, self.weights[weight_name])
                positions = largest_of_groups(scores, (1, *shape)[-1], *self.pattern)
            else:
                own = counts[weight_name] if counts else count_for(self.share, scores.numel())
                positions = largest(scores, own)
            chosen[weight_name] = positions[scores[positions] >= 0]  # scores are negative where to avoid
        return chosen, draws

    def _inputs(self, mask: Mask) -> Iterator[tuple[str, MaskInput]]:
        if mask.needs_gradients:
            gradients: Iterator[tuple[str, Tensor | None]] = sums(
                self.model, self.weights, self.batches, self.loss, self.progress, self.all_needed
            )
        else:
            gradients = ((name, None) for name in self.weights)
        for name, total in gradients:
            given = MaskInput(
                weight=self.weights[name].detach(),
                shape=matrix_shape(self.model, name, self.weights[name]),
                share=self.share,
                gradients=total,
                seed=f"{self.seed} {self.views[name][0].name}",
                avoid=self.avoid.get(name),
                views=self.views[name],
            )
            yield name, given

    def _scores(self, mask: Mask) -> Iterator[tuple[str, Tensor]]:
        """(name, flat float32 scores), weight by weight; negative where to avoid."""
        assert mask.scores is not None
        for name, given in self._inputs(mask):
            scores = mask.scores(given)
            if scores.numel() != given.weight.numel() or bool((scores < 0).any()):
                raise ArgumentError(
                    f"mask {mask.name!r} does not give a score of 0 or more for each of the {given.weight.numel()}"
                    f" elements of tensor {name!r}; mend its function"
                )
            scores = scores.reshape(-1).to(given.weight.device, torch.float32)
            if given.avoid is not None:
                # Not in place: a function may return the weight itself.
                scores = scores.index_fill(0, torch.from_numpy(given.avoid).to(scores.device), -1)
            yield name, scores

    def _counts(self, mask: Mask) -> dict[str, int]:
        """Counts how many of the largest scores of all weights lie in each weight."""
        total = count_for(self.share, sum(weight.numel() for weight in self.weights.values()))
        histograms = {}
        for name, scores in self._scores(mask):
            classes = torch.bincount(scores[scores >= 0].view(torch.int32) >> 16, minlength=CLASSES)
            histograms[name] = Histogram.of_counts(np.asarray(classes.cpu()))
        return allocate(histograms, total)


def _checked_positions(mask: Mask, given: MaskInput, name: str, found: Positions | Tensor) -> Tensor:
    """The positions that a mask's function gave, but for those to avoid."""
    positions = torch.as_tensor(found, device=given.weight.device)
    integer = not positions.is_floating_point() and not positions.is_complex() and positions.dtype != torch.bool
    sound = integer and positions.dim() == 1 and bool((positions.diff() > 0).all())
    if not sound or (positions.numel() and not 0 <= int(positions[0]) <= int(positions[-1]) < given.weight.numel()):
        raise ArgumentError(
            f"mask {mask.name!r} does not give increasing positions within tensor {name!r} of"
            f" {given.weight.numel()} elements; mend its function"
        )
    if given.avoid is None:
        return positions.long()
    return positions[~torch.isin(positions, torch.from_numpy(given.avoid).to(positions.device))].long()
