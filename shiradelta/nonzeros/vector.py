"""All nonzeros of a model as one vector, for loops of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.nonzeros.patched import CHUNK, Place, flat, patch, unpatch


class Part(Place):
    """A place whose nonzeros are a part of `Nonzeros`' vectors."""

    def __init__(
        self, parameter: nn.Parameter, stored: torch.dtype, part: slice, positions: Tensor, base: Tensor
    ) -> None:
        super().__init__(parameter, stored, positions, base)
        self.part = part

    def refresh(self, weight: Tensor, values: Tensor) -> None:
        """The loop writes, and not always the values themselves."""


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
        self.places: list[Part] = []
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
        self._collected: tuple[list[int], Tensor, Tensor] | None = None
        self.places, start = [], 0
        for parameter, stored, count in zip(self._parameters, self._stored, counts, strict=True):
            part = slice(start, start + count)
            self.places.append(Part(parameter, stored, part, self.positions[part], self.base[part]))
            start += count
        # What gradients reach is the same storage from step to step; what the values are, `write` says.
        self._leaves = [self.values[place.part].detach().requires_grad_() for place in self.places]
        for leaf, place in zip(self._leaves, self.places, strict=True):
            leaf.grad = self.grad[place.part]  # a view: autograd adds in place

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
        rounded: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}  # of all places at once: there are hundreds
        for place in self.places:
            weights = flat(place.parameter)
            kind = place.stored, weights.dtype
            if kind not in rounded:
                rounded[kind] = total.to(place.stored).to(weights.dtype)
            weights.scatter_(0, place.positions, rounded[kind][place.part])

    def keep(self, kept: Tensor) -> None:
        """Drops all nonzeros but those of a mask [n]; the weights get the base back until the next `write`."""
        self.write(None)
        counts = [int(kept[place.part].sum()) for place in self.places]
        self.positions, self.base, self.values = self.positions[kept], self.base[kept], self.values[kept]
        self._lay_out(counts)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within, `collect` after a backward pass completes `grad`; the weights are what `write` made them.

        Torch makes the gradient of one weight after another; a hook takes what lies at the mask, and drops the rest.
        Embeddings, of which a batch uses few rows, and weights too large for that are patched.
        """
        tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        patched = {
            p: partial(self._source, i) for i, p in enumerate(self._parameters) if p in tables or p.numel() > CHUNK
        }
        own = [(i, p) for i, p in enumerate(self._parameters) if p not in patched]
        patch(model, patched)
        hooks: list[Any] = []
        for index, parameter in own:
            parameter.requires_grad_(True)
            if parameter.dim() > 1:
                take = partial(self._gather, index)
                hooks.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            unpatch(model.modules())
            for hook in hooks:
                hook.remove()
            for _, parameter in own:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _gather(self, index: int, parameter: Tensor) -> None:
        """What a backward pass left at a matrix."""
        whole, own = parameter.grad, self._leaves[index].grad
        assert whole is not None
        assert own is not None
        own.add_(whole.take(self.places[index].positions))
        parameter.grad = None

    def collect(self) -> None:
        """Adds what a backward pass left at biases and norms.

        Those are small and many: their gradients are kept, and gathered all at once.
        """
        found = [place.parameter for place in self.places if place.parameter.grad is not None]
        if not found:
            return
        if self._collected is None or self._collected[0] != list(map(id, found)):
            self._collected = self._where(found)
        _, targets, positions = self._collected
        gradients = torch.cat([parameter.grad.reshape(-1) for parameter in found if parameter.grad is not None])
        self.grad.index_add_(0, targets, gradients[positions].float())
        for parameter in found:
            parameter.grad = None

    def _where(self, found: Sequence[Tensor]) -> tuple[list[int], Tensor, Tensor]:
        """Which vectors, where their nonzeros lie in `grad`, and where in their gradients, one after the other."""
        ids, start, targets, positions = list(map(id, found)), 0, [], []
        for place in self.places:
            if id(place.parameter) in ids:
                targets.append(torch.arange(place.part.start, place.part.stop, device=self.grad.device))
                positions.append(place.positions + start)
                start += place.numel
        return ids, torch.cat(targets), torch.cat(positions)

    def _source(self, index: int, module: nn.Module, name: str) -> tuple[Tensor, Place]:
        return self._leaves[index], self.places[index]
