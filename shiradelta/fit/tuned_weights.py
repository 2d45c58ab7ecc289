"""Writes a fine-tune onto a model's weights: exact changes, and the dense deltas of the fitted tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.format.delta import TensorDelta
from shiradelta.models.dtypes import torch_dtype
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.select.largest_torch import largest
from shiradelta.select.topk import Selection


class TunedWeights:
    """The tensors to fit in a model, or in a part of it, with the fine-tune's weights beside them.

    Tensors that the fine-tune left alone are not fitted, as with plain top-k.

    Attributes:
        targets: the tensors to fit.
        weights: the model's weights of the targets.
        changed: number of weights that the fine-tune changed, by target.
        energy: sum of squares of each target's dense delta.
        tuned: weight -> the fine-tune's weight.
    """

    def __init__(self) -> None:
        self.targets: list[FitTarget] = []
        self.weights: list[nn.Parameter] = []
        self.changed: list[int] = []
        self.energy: list[float] = []
        self.tuned: dict[nn.Parameter, Tensor] = {}
        self._positions: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, target: FitTarget, weight: nn.Parameter) -> None:
        """Takes a target, if the fine-tune changed it; `weight` holds the base."""
        delta = dense(target, weight.device)
        changed = int(delta.count_nonzero())
        if not changed:
            return
        self.targets.append(target)
        self.weights.append(weight)
        self.changed.append(changed)
        self.energy.append(float(delta.square().sum()))
        self.tuned[weight] = (weight.data.float() + delta.view(weight.shape)).to(weight.dtype)
        self._positions.append(largest(delta.abs(), min(target.count, changed)))
        self._values.append(delta[self._positions[-1]])

    def topk(self) -> Nonzeros:
        """The fine-tune's largest changes, `count` of each target."""
        nonzeros = Nonzeros(self.weights, [torch_dtype(target.dtype) for target in self.targets], self._positions)
        nonzeros.values = torch.cat(self._values)
        return nonzeros

    def selections(self, nonzeros: Nonzeros) -> dict[str, Selection]:
        """The nonzeros by the targets' names, as they go into the file."""
        return {
            target.name: Selection(
                nonzeros.positions[part.span].cpu().numpy(), nonzeros.values[part.span].cpu().numpy(), energy
            )
            for target, part, energy in zip(self.targets, nonzeros.parts, self.energy, strict=True)
        }


def dense(target: FitTarget, device: torch.device) -> Tensor:
    """A target's dense delta, flat.

    Raises:
        SourceError: the delta is not finite.
    """
    return torch.from_numpy(target.dense()).to(device)


def write_exact(weights: Tensor, delta: TensorDelta) -> None:
    """Writes a delta onto flat weights in place; a sum is made in float32 and rounded once to the weights' dtype."""
    # Read-only arrays are copied: torch warns of them.
    positions, values = (
        torch.from_numpy(np.require(array, requirements="W")).to(weights.device)
        for array in (delta.positions(), delta.values())
    )
    if delta.operation.adds:
        values = weights[positions].float() + values
    weights[positions] = values.to(weights.dtype)


def can_write_exact(name: str, shape: tuple[int, ...], delta: TensorDelta) -> bool:
    """Whether a delta has values for the weights of this name and shape; a removal has none.

    Raises:
        SourceError: the delta is for another shape.
    """
    if delta.operation.removes:
        return False
    if tuple(shape) != delta.shape:
        raise SourceError(
            f"tensor {name!r} has shape {list(shape)} in the model, but its change has {list(delta.shape)}; give the"
            " model that belongs to the files"
        )
    return True
