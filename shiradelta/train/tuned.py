"""One tuned weight: its nonzeros, and the trained values, whole or in FSDP's shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.draw import Draw
from shiradelta.models.views import View
from shiradelta.nonzeros.scaling import Scaling
from shiradelta.nonzeros.weight import WeightNonzeros, flat

#: Suffix of the values' name, beside their weight: `q_proj.weight` has `q_proj.weight_nonzeros`.
SUFFIX = "_nonzeros"


@dataclass
class TunedWeight:
    """One tuned weight.

    Attributes:
        nonzeros: the positions, and the base weights there.
        views: the checkpoint's views of the weight.
        holders: (module, name) of each module that holds the values; tied weights have several.
        scaling: makes the change of the values and of further scales; None where the values are the change.
        draws: the draws that the positions are of, by the names of the views' tensors.
    """

    nonzeros: WeightNonzeros
    views: Sequence[View]
    holders: list[tuple[nn.Module, str]]
    scaling: Scaling | None = None
    draws: Mapping[str, Draw] = field(default_factory=dict)

    @property
    def kept(self) -> Tensor:
        """Bool [n], the nonzeros that are trained: all of them, unless pruning has removed some."""
        kept = self.nonzeros.kept
        return torch.ones_like(self.nonzeros.positions, dtype=torch.bool) if kept is None else kept

    @property
    def nnz(self) -> int:
        """Number of nonzeros that are trained, in all processes."""
        return int(self.kept.sum()) if self.nonzeros.spread is None else self.nonzeros.spread.count

    @property
    def numel(self) -> int:
        """Number of elements of the weight, in all processes."""
        return self.nonzeros.numel if self.nonzeros.spread is None else self.nonzeros.spread.numel

    @property
    def positions(self) -> Tensor:
        """Positions of the nonzeros that are trained, in the whole weight; as `gathered`."""
        where = self.whole_positions()
        return where[self.kept] if self.nonzeros.spread is None else where

    @property
    def values(self) -> nn.Parameter:
        """The parameter that is trained: float32 [n], pruned values included."""
        module, name = self.holders[0]
        found = module._parameters[name]
        assert found is not None
        return found

    @property
    def scales(self) -> nn.Parameter | None:
        """The parameter of the scales, float32; None without a scaling."""
        if self.scaling is None:
            return None
        module, name = self.holders[0]
        return module._parameters[scales_name(name, self.scaling)]

    def changes(self) -> Tensor:
        """What is added to the base now: float32 [n], without autograd."""
        if self.nonzeros.spread is not None:
            return self.nonzeros.spread.own(self.values.detach())
        values, scales = whole(self.values).detach().float(), self.scales
        if self.scaling is None or scales is None:
            return values
        return self.scaling.changes(values, whole(scales).detach())

    @property
    def weight(self) -> Tensor | None:
        """The weight, or this process's part of it; None where FSDP has sharded it.

        The shards hold the base.  Values are added when the weight is gathered.
        """
        module, name = self.holders[0]
        found = module._parameters[name.removesuffix(SUFFIX)]
        return None if found is None else self.nonzeros.part(found)

    def gathered(self, own: Tensor) -> Tensor:
        """What all processes have for their nonzeros, in the order of the whole weight; all of them call this."""
        return own if self.nonzeros.spread is None else self.nonzeros.spread.gather(own)

    def whole_positions(self) -> Tensor:
        """Positions of all processes' nonzeros in the whole weight, pruned ones included, int64; as `gathered`."""
        spread = self.nonzeros.spread
        return self.nonzeros.positions.long() if spread is None else spread.whole_positions()

    def whole_values(self) -> Tensor:
        """The values of all processes, without autograd; as `gathered`."""
        if self.nonzeros.spread is None:
            return whole(self.values).detach().float()
        return self.gathered(self.changes())

    def rms(self) -> float:
        """Root mean square of the weight; 0.02, a common value, if all its elements are zero."""
        assert self.weight is not None
        squares, spread = flat(self.weight).float().square(), self.nonzeros.spread
        if spread is None:
            return float(squares.mean().sqrt()) or 0.02
        return math.sqrt(spread.sum(squares.sum()) / max(spread.numel, 1)) or 0.02

    def write(self) -> None:
        """Writes base + changes into the weight."""
        weight = self.weight
        if weight is not None:
            self.nonzeros.written = None
            is_plain = self.scaling is None and self.nonzeros.spread is None
            self.nonzeros.refresh(weight, self.values.detach() if is_plain else self.changes())

    def restore(self) -> None:
        """Writes the base into the weight."""
        weight = self.weight
        if weight is not None:
            self.nonzeros.written = None
            self.nonzeros.write(None, weight)

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Sets the values, float32 [n] of all processes."""
        spread = self.nonzeros.spread
        if spread is None:
            self.values.copy_(values)
        else:
            spread.put(values.to(spread.chosen.device)[spread.chosen].float(), self.values)

    def load(
        self, name: str, positions: Tensor, values: Tensor, kept: Tensor | None, scales: Tensor | None = None
    ) -> None:
        """Restores a state; None for `kept` means all."""
        weight, spread = self.weight, self.nonzeros.spread
        if spread is not None:
            if not torch.equal(positions, self.whole_positions().cpu()):
                raise DeltaError(f"the state of {name!r} has another mask; give it to reattach")
            self.start_from(values)
        elif weight is not None:
            self.restore()
            where = positions.to(weight.device)
            self.nonzeros.move(compact(where, weight), flat(weight)[where], kept)
            if self.scaling is not None:
                self.scaling.move(weight)
            self.values.data = values.to(self.values.device, torch.float32, copy=True)
        else:
            if not torch.equal(positions, self.nonzeros.positions.long().cpu()):
                raise DeltaError(f"the state of {name!r} has another mask; load it before the model is distributed")
            with torch.no_grad():
                self.values.copy_(shard(values, self.values))
            if kept is not None:
                self.nonzeros.move(self.nonzeros.positions, self.nonzeros.base, kept)
        if self.scales is not None and scales is not None:
            with torch.no_grad():
                self.scales.copy_(shard(scales, self.scales))


def scales_name(name: str, scaling: Scaling) -> str:
    """The name of the scales beside values of a name; it ends in `SUFFIX`, too."""
    return f"{name.removesuffix(SUFFIX)}_{scaling.name}{SUFFIX}"


def holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Parameter -> (module, name) of each module that holds it."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


def compact(positions: Tensor, weight: Tensor) -> Tensor:
    """The positions as int32, which is half the memory, if they fit."""
    return positions.int() if weight.numel() < 1 << 31 else positions


def whole(values: Tensor) -> Tensor:
    """The whole tensor, gathered if FSDP has sharded it."""
    full: Callable[[], Tensor] | None = getattr(values, "full_tensor", None)
    return values if full is None else full()


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as FSDP has sharded another one."""
    if not hasattr(like, "full_tensor"):
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def check_draws(draws: Mapping[str, Draw], views: Sequence[View], positions: Positions) -> None:
    """Compares draws with the positions of a weight: a file could not be written later, when training is done.

    Args:
        draws: by the names of the views' tensors.
        views: the checkpoint's views of the weight.
        positions: in the weight, increasing.

    Raises:
        DeltaError: a position is not of its draw, or a draw is that of a tensor that lies in the weight in part only.
    """
    for view in views:
        if view.name not in draws:
            continue
        if not view.is_whole:
            raise DeltaError(f"there is a draw of tensor {view.name!r}, which lies in the weight in part only")
        draws[view.name].cells_of(view.from_weight(positions)[1], math.prod(view.shape))
