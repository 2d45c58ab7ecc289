"""The nonzeros of one weight: writes base + values into it, and gathers its gradient at their positions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from shiradelta.models.memory import is_sharded, own_part
from shiradelta.nonzeros.spread import SpreadNonzeros

#: Elements of a dense gradient computed at a time: more than any layer of a 7B model has.
CHUNK = 1 << 26


class WeightNonzeros:
    """The nonzeros of one weight: their positions, and the base weights there.

    Attributes:
        parameter: the weight, which takes no gradient itself.
        stored: the dtype that sums are rounded to.
        positions: integers [n], increasing, flat in the weight.
        base: [n], the base weights at the positions.
        spread: which of the nonzeros these are, if tensor parallelism has spread the weight over processes: `parameter`
            and `positions` are those of this process's part then; None otherwise.
        kept: bool [n], the nonzeros that are trained; None for all.  It is changed in place, because compiled graphs
            refer to it.  The others were pruned: their values are zero.  Their base stays known, in case something
            else overwrites the weight.
    """

    def __init__(
        self,
        parameter: Tensor,
        stored: torch.dtype,
        positions: Tensor,
        base: Tensor,
        spread: SpreadNonzeros | None = None,
    ) -> None:
        self.parameter: Tensor = parameter
        self.spread = spread
        self.stored = stored
        self.numel = parameter.numel()
        self.columns = self.numel // max(parameter.shape[0], 1) if parameter.dim() > 1 else self.numel
        self.move(positions, base)

    def move(self, positions: Tensor, base: Tensor, kept: Tensor | None = None) -> None:
        """Switches to another mask; the weight has to hold the base."""
        self.kept = None if kept is None else kept.to(positions.device, copy=True)
        self.positions = positions
        self.base = base
        # Adding zero turns -0 into +0, and a file does not list values that are zero.
        self._negative_zeros = bool(((base == 0) & base.signbit()).any())
        #: Versions of the values and of the weight when the values were written; None if a version may not tell.
        self.written: tuple[int, int] | None = None
        rows = self.numel // max(self.columns, 1)
        step = max(1, CHUNK // max(self.columns, 1))
        edges = [*range(0, rows, step), rows]
        ends = torch.tensor(edges, device=positions.device, dtype=torch.int64) * self.columns
        cuts = torch.searchsorted(positions.long(), ends).tolist()
        #: (first row, last row + 1, first nonzero, last nonzero + 1) of each chunk.
        self.chunks = list(zip(edges[:-1], edges[1:], cuts[:-1], cuts[1:], strict=True))
        self._cache_kept()

    def prune(self, kept: Tensor) -> None:
        """Trains only the nonzeros of a bool mask [n] from now on."""
        if self.kept is None:
            self.kept = torch.ones_like(self.positions, dtype=torch.bool)
        self.kept &= kept
        self._cache_kept()

    def _cache_kept(self) -> None:
        """Caches a `WeightNonzeros` that holds only the kept ones, so that pruned ones cost nothing."""
        self._only_kept: tuple[Tensor, WeightNonzeros] | None = None  # their indices among all, and the kept ones
        self._whole: tuple[int, int] | None = None  # version and address of the weight when all were last written
        if self.kept is not None and not self.kept.all():
            indices = self.kept.nonzero()[:, 0]
            own = copy.copy(self)
            own.parameter = torch.empty(0)  # each call passes the weight
            own.move(self.positions[indices], self.base[indices])
            self._only_kept = indices.to(self.positions.dtype), own

    def part(self, weight: Tensor) -> Tensor | None:
        """What this process has of the weight, to write values into; None where FSDP has sharded it."""
        if not is_sharded(weight):
            return weight
        part: Tensor = own_part(weight)
        return part if self.spread is not None and self.spread.fits(weight) else None

    def masked(self, values: Tensor) -> Tensor:
        """The values [n], with zeros where nonzeros were pruned."""
        return values if self.kept is None else values.where(self.kept, 0)

    def gather(self, rows: Callable[[int, int], Tensor]) -> Tensor:
        """Elements of a matrix at the positions, float32 [n].

        Args:
            rows: rows(start, stop) makes these rows of the matrix; it is called for a few rows at a time.
        """
        if not torch.compiler.is_compiling() and self._only_kept is not None:
            indices, own = self._only_kept
            values = torch.zeros(self.positions.shape, dtype=torch.float32, device=self.positions.device)
            values[indices] = own.gather(rows)
            return values
        found = []
        for first, last, start, stop in self.chunks:
            where = self.positions[start:stop]
            found.append(rows(first, last).reshape(-1)[where - first * self.columns if first else where].float())
        if not found:  # a part without elements
            return torch.zeros(0, device=self.positions.device)
        return self.masked(found[0] if len(found) == 1 else torch.cat(found))

    def write(self, values: Tensor | None, weight: Tensor | None = None) -> None:
        """Writes base + values into the weight, rounded as it will be stored; None restores the base."""
        weight = self.parameter if weight is None else weight
        self.follow(weight)
        self.written = None
        now = weight._version, weight.data_ptr()
        if values is not None and self._only_kept is not None and self._whole == now:  # the pruned ones hold the base
            indices, own = self._only_kept
            own.write(values[indices], weight)
            return
        total = self.base if values is None else self.total(values)
        flat(weight)[self.positions] = total.to(weight.dtype)
        self._whole = now

    def follow(self, other: Tensor) -> None:
        """Moves to the device of another tensor."""
        if self.positions.device != other.device:
            self.positions, self.base = self.positions.to(other.device), self.base.to(other.device)
            self.kept = None if self.kept is None else self.kept.to(other.device)
            self._cache_kept()

    def total(self, values: Tensor) -> Tensor:
        """fl32(W + v), rounded as a reader of the file does (spec/FORMAT.md, section 6.1)."""
        values = self.masked(values)
        total = (values.float() + self.base).to(self.stored)
        return torch.where(values == 0, self.base, total) if self._negative_zeros else total

    def refresh(self, weight: Tensor, values: Tensor) -> None:
        """Writes the values if they may have changed since they were last written.

        Values may change without bumping the tensor's version counter: fused optimizers and `.data` do that.  So a
        backward pass forgets what was written, and the next forward pass writes again.  Writing here does not bump the
        weight's version either.  A change of it means that something else, such as `load_state_dict`, has overwritten
        the weight.
        """
        self.follow(weight)
        if weight is not self.parameter:
            self.parameter = self.parameter.detach()[:0].clone()  # FSDP keeps its shards; do not keep the whole alive
            self.write(values.detach(), weight)
        elif self.written != (versions := (values._version, weight._version)):
            self.write(values.detach(), weight)
            self.written = versions


def flat(parameter: Tensor) -> Tensor:
    """A flat view of a weight's elements, of those of this process if it is a DTensor, without autograd."""
    part: Tensor = own_part(parameter)
    return part.data.view(-1)
