"""Writes a fine-tune onto a model's weights: exact changes, and the dense deltas of the fitted tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.stored import LoadedWeights, Piece, group, joined
from shiradelta.format.arithmetic import Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.models.dtypes import torch_dtype
from shiradelta.models.views import View
from shiradelta.nonzeros.vector import Nonzeros, same_device
from shiradelta.select.largest_torch import largest
from shiradelta.select.topk import Selection

#: Rounds the values of `Nonzeros`, vector by vector, as a reader of the file will see them.
Rounding = Callable[[Sequence[Tensor]], list[Tensor]]


class TunedWeights:
    """The tensors to fit in a model, or in a part of it, with the fine-tune's weights beside them.

    Tensors that the fine-tune left alone are not fitted, as with plain top-k.

    Attributes:
        targets: the tensors to fit, each a weight in memory.
        weights: the model's weights of the targets: parameters and buffers.
        changed: number of weights that the fine-tune changed, by target.
        energy: sum of squares of each target's dense delta.
        tuned: weight -> the fine-tune's weight.
    """

    def __init__(self) -> None:
        self.targets: list[FitTarget] = []
        self.weights: list[Tensor] = []
        self.changed: list[int] = []
        self.energy: list[float] = []
        self.tuned: dict[Tensor, Tensor] = {}
        self._pieces: list[Sequence[Piece]] = []
        self._energy_of: dict[str, float] = {}  # by names in the files
        self._positions: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, name: str, weight: Tensor, pieces: Sequence[Piece]) -> None:
        """Takes a weight, if the fine-tune changed it.

        Args:
            name: the weight's, in memory.
            weight: holds the base.
            pieces: what tensors to fit share with it.
        """
        if len(pieces) == 1 and pieces[0].view.is_same:
            target, chosen = pieces[0].target, None
        else:
            chosen = torch.cat([self._topk_of(piece, weight.device) for piece in pieces]).sort().values
            target = joined(name, weight, pieces, chosen.numel())
        delta = dense(target, weight.device)
        changed = int(delta.count_nonzero())
        if not changed:
            return
        self.targets.append(target)
        self.weights.append(weight)
        self.changed.append(changed)
        self.energy.append(float(delta.square().sum()))
        self.tuned[weight] = (weight.data.float() + delta.view(weight.shape)).to(weight.dtype)
        if chosen is None:
            chosen = largest(delta.abs(), min(target.count, changed))
            self._energy_of[target.name] = self.energy[-1]
        self._pieces.append(pieces)
        self._positions.append(chosen)
        self._values.append(delta[chosen])

    def _topk_of(self, piece: Piece, device: torch.device) -> Tensor:
        """Positions in the weight of those of a tensor's largest changes that the piece has."""
        delta = dense(piece.target, device)
        self._energy_of[piece.target.name] = float(delta.square().sum())
        chosen = largest(delta.abs(), min(piece.target.count, int(delta.count_nonzero())))
        return torch.from_numpy(piece.view.to_weight(chosen.cpu().numpy())[1]).to(device)

    @property
    def covered(self) -> set[Tensor]:
        """The weights of which the tensors to fit have all elements; a file cannot hold changes of others."""
        return {
            weight
            for weight, pieces in zip(self.weights, self._pieces, strict=True)
            if sum(piece.view.weight.numel for piece in pieces) == weight.numel()
        }

    def topk(self) -> Nonzeros:
        """The fine-tune's largest changes, `count` of each target."""
        nonzeros = Nonzeros(self.weights, [torch_dtype(target.dtype) for target in self.targets], self._positions)
        nonzeros.values = nonzeros.joined(self._values)
        return nonzeros

    def selections(self, nonzeros: Nonzeros) -> dict[str, Selection]:
        """The nonzeros by names in the files, as they go into the file."""
        values = torch.cat([own.cpu() for own in nonzeros.values]).numpy()
        return {
            name: Selection(positions, values[indices], self._energy_of[name])
            for name, (indices, positions) in self._in_file(_by_index(nonzeros)).items()
        }

    def quantiser(self, positions: Mapping[int, Tensor], codec: str) -> Rounding:
        """Rounds values of some weights as a reader of the file will see them.

        Args:
            positions: index of a weight -> positions of its nonzeros; their values lie one after the other, in one
                vector for each device, as in `Nonzeros`.
            codec: the value codec.

        Raises:
            SourceError: a tensor of the files is on several devices, so that no vector has all of its values.
        """
        rounders: list[Quantiser] = []
        where: dict[str, int] = {}
        indices = list(positions)
        for run in same_device([self.weights[index] for index in indices]):
            own = {index: positions[index] for index in indices[run]}
            for name in {piece.target.name for index in own for piece in self._pieces[index]}:
                if where.setdefault(name, len(rounders)) != len(rounders):
                    raise SourceError(f"the model has parts of {name!r} on several devices; fit it on one")
            rounders.append(self._quantiser(own, codec))
        return lambda vectors: [rounded(values) for rounded, values in zip(rounders, vectors, strict=True)]

    def _quantiser(self, positions: Mapping[int, Tensor], codec: str) -> Quantiser:
        """Rounds values of some weights on one device, which lie one after the other."""
        device = self.weights[next(iter(positions))].device
        if all(len(self._pieces[index]) == 1 and self._pieces[index][0].view.is_same for index in positions):
            return Quantiser(codec, [at.numel() for at in positions.values()], device)
        indices = [found for found, _ in self._in_file(positions).values()]
        order = torch.from_numpy(np.concatenate(indices)).to(device)
        return Quantiser(codec, [found.size for found in indices], device, order)

    def quantiser_of(self, nonzeros: Nonzeros, codec: str) -> Rounding:
        """The same for all weights."""
        return self.quantiser(_by_index(nonzeros), codec)

    def _in_file(self, positions: Mapping[int, Tensor]) -> dict[str, tuple[Positions, Positions]]:
        """Name in the files -> (indices of its nonzeros in the vector, their positions in the tensor, increasing)."""
        parts: dict[str, list[tuple[Positions, Positions]]] = {}
        start = 0
        for index, here in positions.items():
            for piece in self._pieces[index]:
                chosen, at = piece.view.from_weight(here.cpu().numpy())
                parts.setdefault(piece.target.name, []).append((chosen + start, at))
            start += here.numel()
        found = {}
        for name, some in parts.items():
            indices, at = (np.concatenate(arrays) for arrays in zip(*some, strict=True))
            order = np.argsort(at, kind="stable")
            found[name] = indices[order], at[order]
        return found


def weights_after(targets: Sequence[FitTarget], weights: LoadedWeights) -> dict[Tensor, Tensor]:
    """Weight -> what it is with dense deltas added, for weights that these change; the model has to hold the base."""
    found = TunedWeights()
    pieces, _ = group(targets, weights.find({target.name: target.shape for target in targets}))
    for name, own in pieces.items():
        found.add(name, weights.by_name[name], own)
    return found.tuned


def _by_index(nonzeros: Nonzeros) -> dict[int, Tensor]:
    return dict(enumerate(nonzeros.by_tensor(nonzeros.positions)))


def dense(target: FitTarget, device: torch.device) -> Tensor:
    """A target's dense delta, flat.

    Raises:
        SourceError: the delta is not finite.
    """
    return torch.from_numpy(target.dense()).to(device)


def write_exact(weights: Tensor, delta: TensorDelta, view: View | None = None) -> None:
    """Writes a delta onto flat weights in place; a sum is made in float32 and rounded once to the weights' dtype.

    Args:
        weights: flat.
        delta: the change of a tensor of the checkpoint.
        view: the elements that the two share; None for all, in the same order.
    """
    at, changes = delta.positions(), delta.values()
    if view is not None and not view.is_same:
        chosen, at = view.to_weight(at)
        changes = changes[chosen]
    # Read-only arrays are copied: torch warns of them.
    positions, values = (
        torch.from_numpy(np.require(array, requirements="W")).to(weights.device) for array in (at, changes)
    )
    if delta.operation.adds:
        values = weights[positions].float() + values
    weights[positions] = values.to(weights.dtype)


def exact_homes(
    exact: Sequence[tuple[str, TensorDelta]], weights: LoadedWeights
) -> Iterator[tuple[str, View, TensorDelta]]:
    """Exact changes with the names of the weights that they change; those that the model lacks are left out.

    Raises:
        SourceError: a change is for another shape.
    """
    changes = {name: delta for name, delta in exact if delta.operation.in_result}
    homes = weights.find({name: delta.shape for name, delta in changes.items()})
    for name, home in homes.found.items():
        yield from ((weight, view, changes[name]) for weight, view in home)
