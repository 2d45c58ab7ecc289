"""Reads positions that users give: their own masks, and deltas whose weights to avoid."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiradelta.errors import ArgumentError
from shiradelta.format.arithmetic import Positions
from shiradelta.io.reader import Delta, open_delta
from shiradelta.models.names import Named, Shape, find_names
from shiradelta.models.views import View, whole_view
from shiradelta.util.arrays import distinct

#: A user's own mask: name -> bool tensor of the weight's shape, or flat integer positions in any order.
OwnMask = Mapping[str, Any]


def own_mask(mask: OwnMask, weights: Mapping[str, nn.Parameter], avoid: Mapping[str, Positions]) -> dict[str, Tensor]:
    """Positions by weight, increasing, of a user's own mask, without positions to avoid.

    Weights that the mask does not name are left out.

    Raises:
        ArgumentError: a name is not a target, a shape is wrong, positions are outside or given twice, or the mask is
            empty.
    """
    if not isinstance(mask, Mapping):
        raise ArgumentError(f"the mask is a {type(mask).__name__}; give a mask's name, or a mapping of weights' names")
    found = find_names(dict.fromkeys(mask), dict.fromkeys(weights)).names
    unknown = [name for name in mask if name not in found]
    if unknown or not mask:
        raise ArgumentError(
            f"the mask has {unknown[0]!r}, which is none of the targets ({', '.join(islice(weights, 3))}, ...)"
            if unknown
            else "the mask is empty; give a bool tensor or positions for each weight to train"
        )
    result = {}
    for name, given in mask.items():
        weight = weights[found[name]]
        positions = _own_positions(name, torch.as_tensor(given, device=weight.device), weight)
        taken = torch.from_numpy(avoid.get(found[name], np.zeros(0, np.int64))).to(positions.device)
        result[found[name]] = positions[~torch.isin(positions, taken)]
    return result


def _own_positions(name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        if tensor.shape != weight.shape:
            raise ArgumentError(
                f"the mask of {name!r} has shape {list(tensor.shape)}, the weight {list(weight.shape)}; a mask of"
                " bools has the weight's shape"
            )
        positions = tensor.reshape(-1).nonzero().reshape(-1)
    else:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() != 1:
            raise ArgumentError(
                f"the mask of {name!r} is {tensor.dtype} {list(tensor.shape)}; give bools of the weight's shape, or"
                " integer positions in one dimension"
            )
        positions = tensor.long().unique()  # type: ignore[no-untyped-call]
        outside = positions.numel() and (positions[0] < 0 or positions[-1] >= weight.numel())
        if positions.numel() != tensor.numel() or outside:
            raise ArgumentError(
                f"the mask of {name!r} lists a position twice, or one outside of its {weight.numel()} elements"
            )
    if positions.numel() == 0:
        raise ArgumentError(f"the mask of {name!r} leaves no element; leave the weight out")
    return positions


class WeightNames:
    """Finds weights by their names in the checkpoint or in the model.

    Args:
        weights: of the model, by name.
        views: how the checkpoint has them, by name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], views: Mapping[str, Sequence[View]]) -> None:
        self._offers: dict[str, list[tuple[str, View]]] = {}
        for name, own in views.items():
            for view in own:
                self._offers.setdefault(view.name, []).append((name, view))
        for name, weight in weights.items():
            self._offers.setdefault(name, [(name, whole_view(name, tuple(weight.shape)))])
        self._shapes = {name: offers[0][1].shape for name, offers in self._offers.items()}
        self._same = {
            name: frozenset((weight, view.weight) for weight, view in offers) for name, offers in self._offers.items()
        }

    def find(self, names: Named) -> tuple[dict[str, list[tuple[str, View]]], dict[str, str]]:
        """Finds weights.

        Args:
            names: names with the shapes of their tensors, where these are known.

        Returns:
            (given name -> (a weight's name, the elements that it has), given name -> why it is unclear); names that
            the weights do not have are left out.
        """
        found = find_names(names, self._shapes, self._same)
        return {name: self._offers[other] for name, other in found.names.items()}, found.unclear


def is_outside(positions: Positions, view: View) -> bool:
    """Whether a position lies outside of a view."""
    return bool(positions.size) and bool(positions.min() < 0 or positions.max() >= math.prod(view.shape))


def avoided(others: Sequence[Any], names: WeightNames) -> dict[str, Positions]:
    """Positions by weight that other deltas change.

    Args:
        others: `.shd` files, open deltas, or mappings of names to positions (such as `Tuner.positions`).
        names: of the model's weights.

    Raises:
        ArgumentError: something else is given, a position is outside of its weight, or a name fits several weights.
    """
    found: dict[str, list[Positions]] = {}
    for other in others:
        listed = {name: (shape, positions) for name, shape, positions in _positions(other)}
        known, unclear = names.find({name: shape for name, (shape, _) in listed.items()})
        if unclear:
            label = other if isinstance(other, str | os.PathLike) else "avoid"
            raise ArgumentError(
                f"{label}: {next(iter(unclear.values()))} of the model; give positions under the model's names"
            )
        for given, weights in known.items():
            _, positions = listed[given]
            for name, view in weights:
                if is_outside(positions, view):
                    raise ArgumentError(f"{other}: tensor {given!r} has positions outside of the model's weight")
                found.setdefault(name, []).append(view.to_weight(positions)[1])
    return {name: distinct(np.concatenate(parts)) for name, parts in found.items()}


def _positions(other: Any) -> Iterator[tuple[str, Shape | None, Positions]]:
    """(name, shape of the tensor, where it is known, positions)."""
    if isinstance(other, str | os.PathLike | bytes):
        with open_delta(other) as delta:
            yield from _positions(delta)
    elif isinstance(other, Delta):
        for name, tensor in other.items():
            if tensor.operation.in_result:
                yield name, tensor.shape, tensor.positions()
    elif isinstance(other, Mapping):
        for name, positions in other.items():
            yield name, None, np.asarray(positions.cpu() if isinstance(positions, Tensor) else positions, np.int64)
    else:
        raise ArgumentError(f"avoid has {type(other).__name__}; give .shd files, open deltas or positions by name")
