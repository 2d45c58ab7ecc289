"""Gradients of a base delta's nonzeros, an example at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import ShiraDeltaError, SourceError, TargetError
from shiradelta.experts.by_example import NotByExampleError, gradients_by_example, linear_layers
from shiradelta.io.reader import open_delta
from shiradelta.models.saved import stored_views
from shiradelta.nonzeros.patched import is_patched
from shiradelta.train.given import WeightNames
from shiradelta.train.gradients import Loss, taking_gradients
from shiradelta.util.progress import Progress


@dataclass(frozen=True)
class NonzeroPiece:
    """Nonzeros of one tensor of a file that lie in one weight of a model.

    Attributes:
        tensor: the tensor's name in the file.
        order: int64 [n], the nonzeros, as indices of the tensor's.
        weight: the weight's name.
        positions: int64 [n], flat in the weight, on its device.
    """

    tensor: str
    order: Tensor
    weight: str
    positions: Tensor


class NonzeroGradients:
    """Takes the gradients of a loss at a delta's nonzeros.

    A backward pass makes the dense gradient of one weight after another; each is gathered and freed.

    Args:
        model: the model; its weights may have the delta on them, or any other.
        path: the `.shd` file.

    Attributes:
        counts: the file's tensors -> number of nonzeros.
        pieces: where the nonzeros are in the model.

    Raises:
        SourceError: a tensor of the file is not a parameter of the model.
        TargetError: the model has a tuner.
    """

    def __init__(self, model: nn.Module, path: str | os.PathLike[str]) -> None:
        if any(map(is_patched, model.modules())):
            raise TargetError("the model, or a part of it, has a tuner; detach() it first")
        self._model = model
        weights = dict(model.named_parameters())
        names = WeightNames(weights, stored_views(model, weights))
        self.counts: dict[str, int] = {}
        self.pieces: list[NonzeroPiece] = []
        with open_delta(path) as delta:
            found, unclear = names.find({name: tensor.shape for name, tensor in delta.items()})
            for name, tensor in delta.items():
                if name not in found:
                    why = unclear.get(name, f"tensor {name!r} is no parameter")
                    raise SourceError(f"{path}: {why} of the model; give the model that it was made for")
                self.counts[name] = tensor.nnz
                positions = tensor.positions()
                for weight, view in found[name]:
                    order, where = view.to_weight(positions)
                    at = torch.from_numpy(where).to(weights[weight].device)
                    self.pieces.append(NonzeroPiece(name, torch.from_numpy(order), weight, at))
        self._weights = {piece.weight: weights[piece.weight] for piece in self.pieces}
        self._by_weight: dict[str, list[int]] = {}
        for number, piece in enumerate(self.pieces):
            self._by_weight.setdefault(piece.weight, []).append(number)
        self._layers = linear_layers(model, {weight: name for name, weight in self._weights.items()})

    def each(
        self,
        examples: Sequence[Any],
        loss: Loss,
        take: Callable[[int, list[Tensor]], None],
        progress: Progress,
        what: str,
        batch: int = 1,
    ) -> None:
        """Takes the gradient of each example's loss.

        Args:
            examples: the examples.
            loss: loss(model, [example]); with a batch, loss(model, examples).
            take: take(number of the example, float32 gradient of each of `pieces`); zero where the loss does not
                depend on a weight.
            progress: called with (what, done, total).
            what: what the gradients are for.
            batch: examples to run together, of which each gets its share of the loss of all, times their number: a
                factor that is 1 where all weigh the same.  Where weights are not of linear layers, or a layer's input
                has no row an example, examples run one by one all the same.

        Raises:
            ShiraDeltaError: a gradient is not finite, or is zero at all nonzeros.
        """
        for start in range(0, len(examples), batch):
            progress(what, start, len(examples))
            some = examples[start : start + batch]
            together = self._together(some, loss) if len(some) > 1 and self._layers is not None else None
            for number, example in enumerate(some):
                taken = self._alone(example, loss) if together is None else [one[number] for one in together]
                _check(taken, start + number + 1)
                take(start + number, taken)

    def _alone(self, example: Any, loss: Loss) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def gather(name: str, gradient: Tensor) -> None:
            for number in self._by_weight[name]:
                found[number] = gradient.reshape(-1)[self.pieces[number].positions].float()

        with torch.inference_mode(False), taking_gradients(self._model, self._weights, gather), torch.enable_grad():
            value = loss(self._model, [example])
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        return [
            found[index] if index in found else torch.zeros_like(piece.positions, dtype=torch.float32)
            for index, piece in enumerate(self.pieces)
        ]

    def _together(self, examples: Sequence[Any], loss: Loss) -> list[Tensor] | None:
        """Of each piece, float32 [examples, n]; None if a layer's input has no row an example."""
        assert self._layers is not None
        at = {name: torch.cat([self.pieces[n].positions for n in own]) for name, own in self._by_weight.items()}
        found: dict[str, Tensor] = {}

        def take(name: str, gradients: Tensor) -> None:
            found[name] = found[name] + gradients if name in found else gradients

        count = len(examples)
        try:
            taking = gradients_by_example(self._model, self._layers, at, count, take)
            with torch.inference_mode(False), torch.enable_grad(), taking:
                value = loss(self._model, examples)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
        except NotByExampleError:
            self._layers = None
            return None
        result: list[Tensor] = [torch.empty(0)] * len(self.pieces)
        for name, own in self._by_weight.items():
            whole = found[name] * count if name in found else torch.zeros(count, len(at[name]), device=at[name].device)
            parts = whole.split([len(self.pieces[n].positions) for n in own], 1)  # type: ignore[no-untyped-call]
            for number, part in zip(own, parts, strict=True):
                result[number] = part
        return result


def _check(taken: Sequence[Tensor], number: int) -> None:
    """Raises ShiraDeltaError if a gradient is not finite, or all are zero."""
    lengths = torch.stack([one.norm().to(taken[0].device) for one in taken]).cpu()
    if not torch.isfinite(lengths).all():
        raise ShiraDeltaError(f"example {number} has a gradient with NaN or infinity; leave it out")
    if not lengths.any():
        raise ShiraDeltaError(
            f"example {number} has no gradient at the nonzeros of the base delta; leave it out, or check"
            " that the loss depends on the weights"
        )
