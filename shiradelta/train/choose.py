"""From a mask's name, or a mask of one's own, to positions by weight."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Positions
from shiradelta.io.reader import Delta, open_delta
from shiradelta.models.names import rename_all
from shiradelta.models.views import View
from shiradelta.select.histogram import CLASSES, Histogram, allocate
from shiradelta.select.largest_torch import largest, largest_of_groups
from shiradelta.select.shares import count_for, exact_count_for
from shiradelta.train import masks
from shiradelta.train.gradients import Loss, Tell, sums

#: A mask of one's own: name -> bool tensor of the weight's shape, or integer positions, flat, in any order.
OwnMask = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What to choose by.

    Attributes:
        model: the whole.
        weights: of it, to choose from, by name.
        views: the weights as the checkpoint has them, by name.
        share: of each weight, or of all together.
        pattern: n of every m, in place of the largest.
        whole_model: the share is that of all weights together.
        avoid: positions by weight that are not to be chosen, increasing.
        seed: of `rand`.
        batches: calibration batches, for masks that need gradients.
        loss: of a batch.
        tell: is told how far it is.
        all_needed: whether a weight that the loss does not depend on is an error, or is left out.
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
    tell: Tell
    all_needed: bool

    def by_name(self, mask: str) -> dict[str, Tensor]:
        """Positions by weight, int64, increasing, where the weight lies."""
        if mask not in masks.MASKS:
            raise DeltaError(f"mask {mask!r} is unknown; take {', '.join(masks.MASKS)}, or give your own by name")
        if mask == "struct" and (self.pattern or self.whole_model):
            raise DeltaError("struct has a pattern of its own, tensor by tensor; give it a share and scope='tensor'")
        if not self.whole_model and self.pattern is None:
            for name, weight in self.weights.items():
                self._count(name, weight)
        if mask == "struct":
            return {name: self._struct(name, weight) for name, weight in self.weights.items()}
        if mask == "rand" and self.pattern is None:
            return {name: self._rand(name, weight) for name, weight in self.weights.items()}
        counts = self._counts_by_score(mask) if self.whole_model else {}
        chosen = {}
        for name, scores in self._scores(mask):
            weight = self.weights[name]
            if self.pattern is not None:
                positions = largest_of_groups(scores, (1, *self._shape(name))[-1], *self.pattern)
            else:
                positions = largest(scores, counts[name] if counts else self._count(name, weight))
            chosen[name] = positions[scores[positions] >= 0]  # what is to be avoided has scores below
        return chosen

    def _count(self, name: str, weight: Tensor) -> int:
        return exact_count_for(self.share, weight.numel(), name)

    def _struct(self, name: str, weight: Tensor) -> Tensor:
        count, avoid = self._count(name, weight), self.avoid.get(name)
        shape = self._shape(name)
        if avoid is None:
            return torch.from_numpy(masks.struct(shape, count)).to(weight.device)
        # Whatever the other mask is, some shift of the rows meets it least.
        starts = range(min(shape[0] if shape else 1, 64))
        apart = (np.setdiff1d(masks.struct(shape, count, start), avoid, assume_unique=True) for start in starts)
        return torch.from_numpy(max(apart, key=len)).to(weight.device)

    def _shape(self, name: str) -> tuple[int, ...]:
        """A weight's; a convolution's as of the matrix that it is: [out, all others]."""
        shape = tuple(self.weights[name].shape)
        module = self.model.get_submodule(name.rpartition(".")[0])
        return (shape[0], math.prod(shape[1:])) if isinstance(module, _Convolution) and len(shape) > 1 else shape

    def _rand(self, name: str, weight: Tensor) -> Tensor:
        seed = f"{self.seed} {self.views[name][0].name}"
        found = masks.rand(weight.numel(), self.share, seed, self.avoid.get(name))
        return torch.from_numpy(found).to(weight.device)

    def _scores(self, mask: str) -> Iterator[tuple[str, Tensor]]:
        """(name, flat float32 scores), weight by weight; below zero what is to be avoided."""
        if masks.MASKS[mask]:
            score = getattr(masks, mask)
            found = (
                (name, score(self.weights[name].detach(), total))
                for name, total in sums(self.model, self.weights, self.batches, self.loss, self.tell, self.all_needed)
            )
        elif mask == "wm":
            found = ((name, masks.wm(weight.detach())) for name, weight in self.weights.items())
        else:
            found = ((name, self._random_scores(name, weight)) for name, weight in self.weights.items())
        for name, scores in found:
            if name in self.avoid:
                scores[torch.from_numpy(self.avoid[name]).to(scores.device)] = -1
            yield name, scores

    def _random_scores(self, name: str, weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(masks.seed_of(f"{self.seed} {self.views[name][0].name}"))
        return torch.rand(weight.numel(), generator=generator).to(weight.device)

    def _counts_by_score(self, mask: str) -> dict[str, int]:
        """How many of the largest scores of all weights together lie in each."""
        total = count_for(self.share, sum(weight.numel() for weight in self.weights.values()))
        counts = {
            name: torch.bincount(scores[scores >= 0].view(torch.int32) >> 16, minlength=CLASSES).cpu()
            for name, scores in self._scores(mask)
        }
        return allocate({name: Histogram.of_counts(found.numpy()) for name, found in counts.items()}, total)


def own_mask(mask: OwnMask, weights: Mapping[str, nn.Parameter], avoid: Mapping[str, Positions]) -> dict[str, Tensor]:
    """Positions by weight, increasing, of a mask of one's own, without what is to be avoided.

    Weights that the mask lacks are left out.

    Raises:
        DeltaError: a name that is no target, a wrong shape, positions outside or given twice, nothing at all.
    """
    if not isinstance(mask, Mapping):
        raise DeltaError(f"the mask is a {type(mask).__name__}; give a mask's name, or your own mask by weights' names")
    found = rename_all(list(mask), weights)
    unknown = [name for name in mask if name not in found]
    if unknown or not mask:
        raise DeltaError(
            f"the mask has {unknown[0]!r}, which is none of the targets ({', '.join(islice(weights, 3))}, ...)"
            if unknown
            else "the mask is empty; give a bool tensor or positions for each weight to train"
        )
    result = {}
    for name, given in mask.items():
        weight = weights[found[name]]
        tensor = torch.as_tensor(given, device=weight.device)
        if tensor.dtype == torch.bool:
            if tensor.shape != weight.shape:
                raise DeltaError(
                    f"the mask of {name!r} has shape {list(tensor.shape)}, the weight {list(weight.shape)}; a mask of"
                    " bools has the weight's shape"
                )
            positions = tensor.reshape(-1).nonzero().reshape(-1)
        else:
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() != 1:
                raise DeltaError(
                    f"the mask of {name!r} is {tensor.dtype} {list(tensor.shape)}; give bools of the weight's shape, or"
                    " integer positions in one dimension"
                )
            positions = tensor.long().unique()  # type: ignore[no-untyped-call]
            outside = positions.numel() and (positions[0] < 0 or positions[-1] >= weight.numel())
            if positions.numel() != tensor.numel() or outside:
                raise DeltaError(
                    f"the mask of {name!r} lists a position twice, or one outside of its {weight.numel()} elements"
                )
        if positions.numel() == 0:
            raise DeltaError(f"the mask of {name!r} leaves no element; leave the weight out")
        taken = torch.from_numpy(avoid.get(found[name], np.zeros(0, np.int64))).to(positions.device)
        result[found[name]] = positions[~torch.isin(positions, taken)]
    return result


def avoided(
    others: Sequence[Any], weights: Mapping[str, nn.Parameter], views: Mapping[str, Sequence[View]]
) -> dict[str, Positions]:
    """Positions by weight that other adapters change.

    Args:
        others: `.shd` files, open deltas, or mappings of names to positions (such as `Tuner.positions`).
        weights: by name.
        views: of them in the checkpoint, by name.
    """
    found: dict[str, list[Positions]] = {}
    of_checkpoint = {view.name: (name, view) for name, some in views.items() for view in some}
    of_checkpoint |= {name: (name, _whole(name, weight)) for name, weight in weights.items()}
    for other in others:
        listed = dict(_positions(other))
        renamed = rename_all(listed, of_checkpoint)
        for checkpoint_name, positions in listed.items():
            if checkpoint_name in renamed:
                name, view = of_checkpoint[renamed[checkpoint_name]]
                if positions.size and positions.max() >= math.prod(view.shape):
                    raise DeltaError(f"{other}: tensor {checkpoint_name!r} has positions outside of the model's weight")
                found.setdefault(name, []).append(view.to_weight(positions))
    return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


def _whole(name: str, weight: Tensor) -> View:
    return View(name, tuple(weight.shape), tuple(weight.stride()), 0)


def _positions(other: Any) -> Iterator[tuple[str, Positions]]:
    if isinstance(other, str | os.PathLike | bytes):
        with open_delta(other) as delta:
            yield from _positions(delta)
    elif isinstance(other, Delta):
        for name, tensor in other.items():
            if tensor.op != "drop":
                yield name, tensor.positions()
    elif isinstance(other, Mapping):
        for name, positions in other.items():
            yield name, np.asarray(positions.cpu() if isinstance(positions, Tensor) else positions, np.int64)
    else:
        raise DeltaError(f"avoid has {type(other).__name__}; give .shd files, open deltas or positions by name")
