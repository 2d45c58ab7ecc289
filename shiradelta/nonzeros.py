"""Nonzeros as the only parameters: written into the dense weights, their gradients gathered at the mask.

A forward pass uses the weights as they lie there, patched in place; nothing is cloned.  The backward pass makes the
dense gradient of one weight, a few rows at a time, and keeps what lies at the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Elements of a dense gradient that are made at a time.
CHUNK = 1 << 24


class Place:
    """The nonzeros of one weight: a part of `Nonzeros`' vectors."""

    def __init__(self, parameter: nn.Parameter, stored: torch.dtype, part: slice, positions: Tensor) -> None:
        self.parameter = parameter
        self.stored = stored
        self.part = part
        self.positions = positions
        self.columns = parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else parameter.numel()
        rows = parameter.numel() // max(self.columns, 1)
        step = max(1, CHUNK // max(self.columns, 1))
        edges = [*range(0, rows, step), rows]
        cuts = torch.searchsorted(positions, torch.tensor(edges, device=positions.device) * self.columns).tolist()
        #: (first row, last row + 1, first nonzero, last nonzero + 1) of each chunk.
        self.chunks = list(zip(edges[:-1], edges[1:], cuts[:-1], cuts[1:], strict=True))

    def gather(self, rows: Callable[[int, int], Tensor]) -> Tensor:
        """Elements at the mask of a matrix that is made a few rows at a time; float32."""
        found = [
            rows(first, last).reshape(-1)[self.positions[start:stop] - first * self.columns].float()
            for first, last, start, stop in self.chunks
        ]
        return torch.cat(found)


class _PatchedLinear(torch.autograd.Function):
    """A linear layer of which only the nonzeros of the weight are parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        flat, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            ctx.place.gather(lambda start, stop: flat[:, start:stop].T @ inputs),
            None,
            flat.sum(0) if ctx.needs_input_grad[3] else None,
            None,
        )


class Nonzeros:
    """All nonzeros of a model as one vector, tensor after tensor, positions increasing.

    Attributes:
        positions: int64 [n], flat in the tensor.
        base: float32 [n], the base's weights there.
        values: float32 [n], what is added to them.
        grad: float32 [n], filled by backward passes within `attached`.
        places: one a tensor.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], stored: Sequence[torch.dtype], positions: Sequence[Tensor]
    ) -> None:
        self._parameters, self._stored = list(parameters), list(stored)
        self.places: list[Place] = []
        self.reset(torch.cat(list(positions)), [p.numel() for p in positions])

    def reset(self, positions: Tensor, counts: Sequence[int], values: Tensor | None = None) -> None:
        """Takes another mask, and values (zeros by default); the weights have the base until the next `write`."""
        if self.places:
            self.write(None)
        self.positions = positions.to(self._parameters[0].device)
        parts: list[Tensor] = list(torch.split(self.positions, list(counts)))
        self.base = torch.cat(
            [flat(parameter)[p].float() for parameter, p in zip(self._parameters, parts, strict=True)]
        )
        self.values = torch.zeros_like(self.base) if values is None else values.to(self.base)
        self._lay_out(counts)

    def _lay_out(self, counts: Sequence[int]) -> None:
        self.grad = torch.zeros_like(self.values)
        self.places, start = [], 0
        for parameter, stored, count in zip(self._parameters, self._stored, counts, strict=True):
            part = slice(start, start + count)
            self.places.append(Place(parameter, stored, part, self.positions[part]))
            start += count

    @property
    def counts(self) -> list[int]:
        """Nonzeros by tensor."""
        return [place.part.stop - place.part.start for place in self.places]

    def per_tensor(self, numbers: Sequence[float]) -> Tensor:
        """One number a tensor -> one a nonzero."""
        counts = torch.tensor(self.counts, device=self.values.device)
        return torch.tensor(numbers, device=self.values.device).repeat_interleave(counts)

    def write(self, values: Tensor | None = None) -> None:
        """Puts base + values into the weights, rounded as they will be stored; None puts the base back."""
        total = self.base if values is None else self.base + values
        for place in self.places:
            weights = flat(place.parameter)
            weights[place.positions] = total[place.part].to(place.stored).to(weights.dtype)

    def keep(self, kept: Tensor) -> None:
        """Drops all nonzeros but those of a mask [n]; the weights get the base back until the next `write`."""
        self.write(None)
        counts = [int(kept[place.part].sum()) for place in self.places]
        self.positions, self.base, self.values = self.positions[kept], self.base[kept], self.values[kept]
        self._lay_out(counts)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within, backward passes through the model add to `grad`."""
        linears = _linears(model)
        undo: list[Callable[[], None]] = []
        for index, place in enumerate(self.places):
            layer = linears.get(id(place.parameter))
            if layer is not None:
                layer.forward = partial(self._linear, layer, index)  # type: ignore[method-assign]
                undo.append(partial(delattr, layer, "forward"))
            else:
                place.parameter.requires_grad_(True)
                hook = place.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._accumulate, index)
                )
                undo += [hook.remove, partial(setattr, place.parameter, "requires_grad", False)]
        try:
            yield
        finally:
            for step in undo:
                step()

    def _linear(self, layer: nn.Linear, index: int, x: Tensor) -> Tensor:
        place = self.places[index]
        leaf = self.values[place.part].detach().requires_grad_(torch.is_grad_enabled())
        leaf.grad = self.grad[place.part]  # a view: autograd adds in place
        output: Tensor = _PatchedLinear.apply(x, leaf, layer.weight, layer.bias, place)  # type: ignore[no-untyped-call]
        return output

    def _accumulate(self, index: int, parameter: Tensor) -> None:
        """Of weights that are no linear layer's own: embeddings, norms, biases, tied ones."""
        assert parameter.grad is not None
        place = self.places[index]
        self.grad[place.part] += parameter.grad.reshape(-1)[place.positions].float()
        parameter.grad = None


def flat(parameter: nn.Parameter) -> Tensor:
    """A weight's elements, to be read and written."""
    return parameter.data.view(-1)


def _linears(model: nn.Module) -> dict[int, nn.Linear]:
    """id of a weight -> the linear layer that alone uses it."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    return {
        key: found[0]
        for key, found in users.items()
        if len(found) == 1 and type(found[0]) is nn.Linear and key == id(found[0].weight)
    }
