"""All nonzeros of a model, for the training loops of `shiradelta.fit`: one vector for the tensors of each device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.nonzeros.patched import NonzerosOf, patch, unpatch
from shiradelta.nonzeros.weight import CHUNK, WeightNonzeros, flat

#: Bytes of memory that a nonzero takes at most while a fit trains it: 8 of the position, 4 each of base, value,
#: gradient, two moments and unit, 8 to group values for the codec, 28 of the best values and of the state to resume
#: from, and what rounding or the next such state takes in between.
BYTES = 90


def same_device(weights: Sequence[Tensor]) -> list[slice]:
    """The longest runs of consecutive weights that are on one device."""
    runs, start = [], 0
    for _, run in groupby(weights, lambda weight: weight.device):
        runs.append(slice(start, start + len(list(run))))
        start = runs[-1].stop
    return runs


class VectorPart(WeightNonzeros):
    """The nonzeros of one weight, which are the slice `span` of a `DeviceVector`."""

    def __init__(self, parameter: Tensor, stored: torch.dtype, span: slice, positions: Tensor, base: Tensor) -> None:
        super().__init__(parameter, stored, positions, base)
        self.span = span

    def refresh(self, weight: Tensor, values: Tensor) -> None:
        """Does nothing: the training loop writes, and may write rounded values."""


class DeviceVector:
    """The nonzeros of tensors on one device as one vector, tensor after tensor, positions increasing within each.

    Args:
        parameters: the tensors.
        stored: the dtype that each one's sums are rounded to.
        positions: of each one's nonzeros.

    Attributes:
        positions: int64 [n], flat in the tensor.
        base: float32 [n], the base weights at the positions.
        values: float32 [n], added to the base.
        grad: float32 [n], filled by backward passes within `Nonzeros.attached`.
        parts: one per tensor.
    """

    def __init__(
        self, parameters: Sequence[Tensor], stored: Sequence[torch.dtype], positions: Sequence[Tensor]
    ) -> None:
        self._parameters, self._stored = list(parameters), list(stored)
        self.parts: list[VectorPart] = []
        self.reset(positions, None)

    def reset(self, positions: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
        """As `Nonzeros.reset`."""
        if self.parts:
            self.write(None)
        counts = [where.numel() for where in positions]
        self.positions = torch.cat(list(positions)).to(self._parameters[0].device)
        parts = torch.split(self.positions, counts)
        self.base = torch.cat(
            [flat(parameter)[p].float() for parameter, p in zip(self._parameters, parts, strict=True)]
        )
        self.values = torch.zeros_like(self.base) if values is None else torch.cat(list(values)).to(self.base)
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
        """As `Nonzeros.per_tensor`, for its own tensors."""
        counts = torch.tensor(self.counts, device=self.values.device)
        return torch.tensor(numbers, device=self.values.device).repeat_interleave(counts)

    def write(self, values: Tensor | None) -> None:
        """As `Nonzeros.write`."""
        total = self.base if values is None else self.base + values
        rounded: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}  # for all weights at once: there are hundreds
        for part in self.parts:
            weights = flat(part.parameter)
            kind = part.stored, weights.dtype
            if kind not in rounded:
                rounded[kind] = total.to(part.stored).to(weights.dtype)
            weights.scatter_(0, part.positions, rounded[kind][part.span])

    def keep(self, kept: Tensor) -> None:
        """As `Nonzeros.keep`."""
        self.write(None)
        counts = [int(kept[part.span].sum()) for part in self.parts]
        self.positions, self.base, self.values = self.positions[kept], self.base[kept], self.values[kept]
        self._lay_out(counts)

    def gather(self, index: int, parameter: Tensor) -> None:
        """Gathers the gradient that a backward pass left at a matrix."""
        whole, own = parameter.grad, self._leaves[index].grad
        assert whole is not None
        assert own is not None
        own.add_(whole.take(self.parts[index].positions))
        parameter.grad = None

    def collect(self) -> None:
        """As `Nonzeros.collect`."""
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

    def source(self, index: int, module: nn.Module, name: str) -> tuple[Tensor, WeightNonzeros]:
        """What `patch` asks for: the values of a tensor that take the gradients, and its nonzeros."""
        return self._leaves[index], self.parts[index]


class Nonzeros:
    """All nonzeros of a model.

    Consecutive tensors on one device share a vector; there is one where the whole model is on one device.  Everything
    about a nonzero is on the device of its weight, because one GPU may not hold it for a large model.

    Args:
        parameters: the tensors.
        stored: the dtype that each one's sums are rounded to.
        positions: of each one's nonzeros.

    Attributes:
        vectors: in the order of the tensors.
    """

    def __init__(
        self, parameters: Sequence[Tensor], stored: Sequence[torch.dtype], positions: Sequence[Tensor]
    ) -> None:
        self._spans = same_device(parameters)
        self.vectors = [DeviceVector(parameters[own], stored[own], positions[own]) for own in self._spans]

    @property
    def parts(self) -> list[VectorPart]:
        """The nonzeros of each tensor."""
        return [part for vector in self.vectors for part in vector.parts]

    @property
    def counts(self) -> list[int]:
        """Nonzeros by tensor."""
        return [count for vector in self.vectors for count in vector.counts]

    @property
    def positions(self) -> list[Tensor]:
        """Of each vector."""
        return [vector.positions for vector in self.vectors]

    @property
    def values(self) -> list[Tensor]:
        """Of each vector."""
        return [vector.values for vector in self.vectors]

    @values.setter
    def values(self, values: Sequence[Tensor]) -> None:
        for vector, own in zip(self.vectors, values, strict=True):
            vector.values = own

    @property
    def grads(self) -> list[Tensor]:
        """Of each vector."""
        return [vector.grad for vector in self.vectors]

    def by_tensor(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Cuts what there is for each vector into what there is for each tensor."""
        pairs = zip(self.vectors, vectors, strict=True)
        return [own for vector, numbers in pairs for own in torch.split(numbers, vector.counts)]

    def joined(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Joins what there is for each tensor to what there is for each vector, as `by_tensor` has cut it."""
        return [torch.cat(list(tensors[own])) for own in self._spans]

    def by_vector(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Cuts numbers, joined in the order of the tensors, into what there is for each vector, on its device."""
        sizes = [len(values) for values in self.values]
        if list(map(len, numbers)) != sizes:  # of a run on other devices
            numbers = torch.split(torch.cat([own.cpu() for own in numbers]), sizes)
        return [own.to(values.device) for own, values in zip(numbers, self.values, strict=True)]

    def per_tensor(self, numbers: Sequence[float]) -> list[Tensor]:
        """Repeats a number per tensor for each of the tensor's nonzeros."""
        return [vector.per_tensor(numbers[own]) for vector, own in zip(self.vectors, self._spans, strict=True)]

    def reset(self, positions: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
        """Switches to another mask and values (zeros by default); the weights hold the base until the next `write`.

        Args:
            positions: by tensor.
            values: by tensor.
        """
        for vector, own in zip(self.vectors, self._spans, strict=True):
            vector.reset(positions[own], None if values is None else values[own])

    def write(self, values: Sequence[Tensor] | None = None) -> None:
        """Writes base + values into the weights, rounded as they will be stored; None restores the base."""
        for number, vector in enumerate(self.vectors):
            vector.write(None if values is None else values[number])

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Keeps only the nonzeros of a bool mask for each vector; the weights hold the base until the next `write`."""
        for vector, own in zip(self.vectors, kept, strict=True):
            vector.keep(own)

    def zero_grad(self) -> None:
        """Sets `grads` to zero, and drops what a backward pass that was broken off has left at the weights."""
        for vector in self.vectors:
            vector.grad.zero_()
            for part in vector.parts:
                part.parameter.grad = None

    def collect(self) -> None:
        """Adds the gradients that a backward pass left at biases and norms.

        They are small and many, so they are kept and gathered all at once.
        """
        for vector in self.vectors:
            vector.collect()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within this context, `collect` after a backward pass completes `grads`.

        Torch makes the gradient of one weight after another.  A hook gathers it at the positions, and frees the rest.
        Embeddings, of which a batch uses few rows, and weights that are too large for a whole gradient are patched.
        Buffers take no gradient: the functions that use them, such as batch norms, may have none.
        """
        tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        every = [(vector, index, part.parameter) for vector in self.vectors for index, part in enumerate(vector.parts)]
        patched: dict[Any, NonzerosOf] = {
            p: partial(vector.source, index) for vector, index, p in every if p in tables or p.numel() > CHUNK
        }
        own = [row for row in every if row[2] not in patched and isinstance(row[2], nn.Parameter)]
        patch(model, patched)
        hooks: list[Any] = []
        for vector, index, parameter in own:
            parameter.requires_grad_(True)
            if parameter.dim() > 1:
                take = partial(vector.gather, index)
                hooks.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            unpatch(model.modules())
            for hook in hooks:
                hook.remove()
            for *_, parameter in own:
                parameter.requires_grad_(False)
                parameter.grad = None
