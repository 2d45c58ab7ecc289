"""Nonzeros of a weight that tensor parallelism has spread over processes: each process has those of its own part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiradelta.models.memory import is_sharded
from shiradelta.models.sharded import Spread


class SpreadNonzeros:
    """Which of a weight's nonzeros this process has.

    Values are a DTensor in which each process has its own, padded with zeros to the same length.  So optimizers, and
    norms over all processes, work on them as on any sharded parameter.

    Args:
        weight: a DTensor.
        positions: of all nonzeros in the whole weight, increasing; the same in all processes.

    Attributes:
        positions: of this process's nonzeros in its part, increasing, int64 [n].
        chosen: their indices among all nonzeros.
        count: number of all nonzeros.
        numel: number of elements of the whole weight.
    """

    def __init__(self, weight: Any, positions: Tensor) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.mesh, self.placements, self.numel = weight.device_mesh, tuple(weight.placements), weight.numel()
        self._split = [one if isinstance(one, Replicate) else Shard(0) for one in self.placements]
        where = positions.cpu().numpy()
        found = [view.to_weight(where) for view in Spread().of(weight)]
        none = np.zeros(0, np.int64)
        chosen, own = map(np.concatenate, zip((none, none), *found, strict=True))
        order = np.argsort(own, kind="stable")
        self.positions = torch.from_numpy(own[order]).to(positions.device)
        self.chosen = torch.from_numpy(chosen[order]).to(positions.device)
        self._in_whole = positions[self.chosen]
        self.count = positions.numel()
        sizes = torch.tensor([self.size], device=positions.device)
        every = self._dtensor(sizes, [Shard(0)] * len(self.placements)).full_tensor()
        self._length = max(int(every.max()), 1)  # torch has no gradients of parts without elements
        self._version: int | None = None

    @property
    def size(self) -> int:
        """Number of this process's nonzeros."""
        return self.positions.numel()

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is spread as the weight was: FSDP spreads it further, between passes."""
        found: Any = tensor
        return is_sharded(tensor) and found.device_mesh == self.mesh and tuple(found.placements) == self.placements

    def wrap(self, own: Tensor) -> Any:
        """The DTensor of what each process has for its nonzeros, [n], padded."""
        return self._dtensor(torch.nn.functional.pad(own, (0, self._length - own.numel())), self._split)

    def own(self, wrapped: Tensor) -> Tensor:
        """This process's part of a DTensor as `wrap` makes it, [n], with autograd.

        Between passes FSDP has a part of that; then all processes have to call this.
        """
        found: Any = wrapped
        if not self.is_whole(wrapped):
            found = found.redistribute(placements=self._gathered(found))
        local: Tensor = found.to_local() if is_sharded(wrapped) else wrapped
        return local[: self.size]

    def put(self, own: Tensor, wrapped: Any) -> None:
        """Writes this process's part into a DTensor that `wrap` made; as `own`."""
        new = self.wrap(own)
        if not self.is_whole(wrapped):
            new = self._dtensor(new.to_local(), self._gathered(wrapped), wrapped.device_mesh)
            new = new.redistribute(placements=wrapped.placements)
        wrapped.copy_(new)

    def _gathered(self, wrapped: Any) -> list[Any]:
        """The placements of a DTensor that FSDP has sharded further, as it gathers it."""
        from torch.distributed.tensor import Replicate

        return [Replicate()] * (len(wrapped.placements) - len(self._split)) + self._split

    def has_changed(self, wrapped: Tensor) -> bool:
        """Whether a DTensor was written since this was asked last; its parts do not count that."""
        before, self._version = self._version, wrapped._version
        return before != self._version

    def is_whole(self, wrapped: Tensor) -> bool:
        """Whether no process has less of a DTensor than `wrap` gave it, as FSDP does between passes."""
        found: Any = wrapped
        return not is_sharded(wrapped) or found.device_mesh == self.mesh

    def gather(self, own: Tensor) -> Tensor:
        """What all processes have for their nonzeros, in the order of the positions in the whole weight, [count].

        All processes have to call this.
        """
        bits = own.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()])
        numbers = self.wrap(self.chosen + 1).full_tensor()  # 0 where it is padded
        every = self.wrap(bits.long()).full_tensor()  # neither gloo nor NCCL has 16-bit integers
        there = numbers > 0
        found = torch.empty(self.count, dtype=bits.dtype, device=bits.device)
        found[numbers[there] - 1] = every[there].to(bits.dtype)
        return found.view(own.dtype)

    def whole_positions(self) -> Tensor:
        """The positions of all processes' nonzeros in the whole weight, int64 [count]; as `gather`."""
        return self.gather(self._in_whole)

    def sum(self, own: Tensor) -> float:
        """The sum of what processes have for their parts, copies once; as `gather`."""
        return float(self._dtensor(own[None], self._split).full_tensor().sum())

    def gradient(self, gradient: Any) -> Tensor:
        """This process's part of a gradient of the weight."""
        found: Tensor = (
            gradient.redistribute(self.mesh, self.placements).to_local() if is_sharded(gradient) else gradient
        )
        return found

    def like(self, weight: Any, part: Tensor) -> Tensor:
        """A DTensor like the weight of which this process has another part, with autograd."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    def _dtensor(self, local: Tensor, placements: Any, mesh: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, mesh or self.mesh, placements, run_check=False)
