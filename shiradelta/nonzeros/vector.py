"""All nonzeros of a model as one vector, for the training loops of `shiradelta.fit`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.nonzeros.patched import NonzerosOf, patch, unpatch
from shiradelta.nonzeros.weight import CHUNK, WeightNonzeros, flat


class VectorPart(WeightNonzeros):
    """The nonzeros of one weight, which are the slice `span` of the vectors of `Nonzeros`."""

    def __init__(self, parameter: Tensor, stored: torch.dtype, span: slice, positions: Tensor, base: Tensor) -> None:
        super().__init__(parameter, stored, positions, base)
        self.span = span

    def refresh(self, weight: Tensor, values: Tensor) -> None:
        """Does nothing: the training loop writes, and may write rounded values."""


class Nonzeros:
    """All nonzeros of a model as one vector, tensor after tensor, positions increasing within each.

    Attributes:
        positions: int64 [n], flat in the tensor.
        base: float32 [n], the base weights at the positions.
        values: float32 [n], added to the base.
        grad: float32 [n], filled by backward passes within `attached`.
        parts: one per tensor.
    """

    def __init__(
        self, parameters: Sequence[Tensor], stored: Sequence[torch.dtype], positions: Sequence[Tensor]
    ) -> None:
        self._parameters, self._stored = list(parameters), list(stored)
        self.parts: list[VectorPart] = []
        self.reset(torch.cat(list(positions)), [p.numel() for p in positions])

    def reset(self, positions: Tensor, counts: Sequence[int], values: Tensor | None = None) -> None:
        """Switches to another mask and values (zeros by default); the weights hold the base until the next `write`."""
        if self.parts:
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
        self.parts, start = [], 0
        for parameter, stored, count in zip(self._parameters, self._stored, counts, strict=True):
            span = slice(start, start + count)
            self.parts.append(VectorPart(parameter, stored, span, self.positions[span], self.base[span]))
            start += count
        # Gradients reach the same storage in each step; `write` says what the values are.
        self._leaves = [self.values[part.span].detach().requires_grad_() for part in self.parts]
        for leaf, part in zip(self._leaves, self.parts, strict=True):
            leaf.grad = self.grad[part.span]  # a view: autograd adds in place

    @property
    def counts(self) -> list[int]:
        """Nonzeros by tensor."""
        return [part.span.stop - part.span.start for part in self.parts]

    def per_tensor(self, numbers: Sequence[float]) -> Tensor:
        """Repeats a number per tensor for each of the tensor's nonzeros."""
        counts = torch.tensor(self.counts, device=self.values.device)
        return torch.tensor(numbers, device=self.values.device).repeat_interleave(counts)

    def write(self, values: Tensor | None = None) -> None:
        """Writes base + values into the weights, rounded as they will be stored; None restores the base."""
        total = self.base if values is None else self.base + values
        rounded: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}  # for all weights at once: there are hundreds
        for part in self.parts:
            weights = flat(part.parameter)
            kind = part.stored, weights.dtype
            if kind not in rounded:
                rounded[kind] = total.to(part.stored).to(weights.dtype)
            weights.scatter_(0, part.positions, rounded[kind][part.span])

    def keep(self, kept: Tensor) -> None:
        """Keeps only the nonzeros of a bool mask [n]; the weights hold the base until the next `write`."""
        self.write(None)
        counts = [int(kept[part.span].sum()) for part in self.parts]
        self.positions, self.base, self.values = self.positions[kept], self.base[kept], self.values[kept]
        self._lay_out(counts)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within this context, `collect` after a backward pass completes `grad`.

        Torch makes the gradient of one weight after another.  A hook gathers it at the positions, and frees the rest.
        Embeddings, of which a batch uses few rows, and weights that are too large for a whole gradient are patched.
        Buffers take no gradient: the functions that use them, such as batch norms, may have none.
        """
        tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        patched: dict[Any, NonzerosOf] = {
            p: partial(self._source, i) for i, p in enumerate(self._parameters) if p in tables or p.numel() > CHUNK
        }
        own = [(i, p) for i, p in enumerate(self._parameters) if p not in patched and isinstance(p, nn.Parameter)]
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
        """Gathers the gradient that a backward pass left at a matrix."""
        whole, own = parameter.grad, self._leaves[index].grad
        assert whole is not None
        assert own is not None
        own.add_(whole.take(self.parts[index].positions))
        parameter.grad = None

    def collect(self) -> None:
        """Adds the gradients that a backward pass left at biases and norms.

        They are small and many, so they are kept and gathered all at once.
        """
        found = [part.parameter for part in self.parts if part.parameter.grad is not None]
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
        """(ids of the vectors, indices of their nonzeros in `grad`, the same in their concatenated gradients)."""
        ids, start, targets, positions = list(map(id, found)), 0, [], []
        for part in self.parts:
            if id(part.parameter) in ids:
                targets.append(torch.arange(part.span.start, part.span.stop, device=self.grad.device))
                positions.append(part.positions + start)
                start += part.numel
        return ids, torch.cat(targets), torch.cat(positions)

    def _source(self, index: int, module: nn.Module, name: str) -> tuple[Tensor, WeightNonzeros]:
        return self._leaves[index], self.parts[index]
