"""The checkpoint's tensors as views of a model's weights, some of them stacked or transposed on loading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from shiradelta.format.arithmetic import Positions
from shiradelta.models.live import Target
from shiradelta.models.peft import BASE_LAYER


@dataclass(frozen=True)
class View:
    """A tensor of the checkpoint as a view of a weight.

    Attributes:
        name: the name in the checkpoint.
        shape: the shape in the checkpoint.
        strides: strides in elements of the weight.
        offset: index of the first element in the weight.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def from_weight(self, positions: Positions) -> tuple[Positions, Positions]:
        """Finds the positions of a weight that belong to the view.

        Returns:
            (their indices in `positions`, in the order of the view; their positions in the view).
        """
        rest = positions - self.offset
        inside = rest >= 0
        at = np.zeros_like(rest)
        steps = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        # Divides by one stride after the other, the largest first; views of one weight do not overlap.
        for dim in sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim]):
            if self.shape[dim] > 1:
                index = rest // self.strides[dim]
                inside &= index < self.shape[dim]
                at += index * steps[dim]
                rest = rest - index * self.strides[dim]
        inside &= rest == 0
        chosen = np.flatnonzero(inside)
        order = chosen[np.argsort(at[chosen], kind="stable")]
        return order, at[order]

    def to_weight(self, positions: Positions) -> Positions:
        """Positions in the weight, given positions in the view, in the same order."""
        if not self.shape:
            return positions + self.offset
        indices = np.unravel_index(positions, self.shape)
        where = np.full_like(positions, self.offset)
        for index, stride in zip(indices, self.strides, strict=True):
            where += index * stride
        return where


def views(weights: Mapping[str, nn.Parameter], targets: Mapping[str, Target]) -> dict[str, list[View]]:
    """Finds the checkpoint's tensors that each weight holds.

    Args:
        weights: contiguous weights by name.
        targets: all tensors of the model by every name.

    Returns:
        A weight's name -> its tensors in the checkpoint.
    """
    storages = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
    found: dict[str, dict[tuple[int, ...], View]] = {name: {} for name in weights}
    own = {name for name, target in targets.items() if not target.view and target.name == name}
    for name, target in targets.items():
        if name in own or target.refusal is not None or BASE_LAYER in name:
            continue
        weight_name = storages.get(target.tensor.untyped_storage().data_ptr())
        if weight_name is None:
            continue
        offset = target.tensor.storage_offset() - weights[weight_name].storage_offset()
        view = View(name, target.shape, tuple(target.tensor.stride()), offset)
        found[weight_name].setdefault((offset, *view.shape, *view.strides), view)
    result = {}
    for name, weight in weights.items():
        other = list(found[name].values())
        whole = sum(math.prod(view.shape) for view in other) == weight.numel()
        shape, strides = tuple(weight.shape), tuple(weight.stride())
        result[name] = other if whole else [View(name, shape, strides, 0)]
    return result
