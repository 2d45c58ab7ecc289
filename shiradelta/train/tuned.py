"""One weight that is tuned, in one process or in FSDP's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError
from shiradelta.models.views import View
from shiradelta.nonzeros.weight import WeightNonzeros, flat, is_sharded

#: What the values are called beside their weight: `q_proj.weight` has `q_proj.weight_nonzeros`.
SUFFIX = "_nonzeros"


@dataclass
class Tuned:
    """One weight that is tuned.

    Attributes:
        nonzeros: of the weight.
        views: how the checkpoint has it.
        holders: modules that hold its values, tied ones more than one, and as what.
    """

    nonzeros: WeightNonzeros
    views: Sequence[View]
    holders: list[tuple[nn.Module, str]]

    @property
    def kept(self) -> Tensor:
        """Bool [n], which nonzeros are trained: all, but where the density falls; the others stay zero."""
        kept = self.nonzeros.kept
        return torch.ones_like(self.nonzeros.positions, dtype=torch.bool) if kept is None else kept

    @property
    def nnz(self) -> int:
        """How many are trained."""
        return int(self.kept.sum())

    @property
    def positions(self) -> Tensor:
        """Where these are."""
        return self.nonzeros.positions[self.kept]

    @property
    def values(self) -> nn.Parameter:
        """What is trained: float32 [n]."""
        module, name = self.holders[0]
        found = module._parameters[name]
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor | None:
        """None where FSDP gives each process a part of it, which holds the base; it is patched when it is gathered."""
        module, name = self.holders[0]
        found = module._parameters[name.removesuffix(SUFFIX)]
        return None if found is None or is_sharded(found) else found

    def write(self, values: Tensor | None) -> None:
        """Puts base + values, or the base, into the weight."""
        weight = self.weight
        if weight is not None:
            self.nonzeros.written = None
            if values is None:
                self.nonzeros.write(None, weight)
            else:
                self.nonzeros.refresh(weight, values)

    def load(self, name: str, positions: Tensor, values: Tensor, kept: Tensor | None) -> None:
        """Takes up a state; of `kept` None is all."""
        weight = self.weight
        if weight is not None:
            self.write(None)
            where = positions.to(weight.device)
            self.nonzeros.move(compact(where, weight), flat(weight)[where], kept)
            self.values.data = values.to(self.values.device, torch.float32, copy=True)
        else:
            if not torch.equal(positions, self.nonzeros.positions.long().cpu()):
                raise DeltaError(f"the state of {name!r} has another mask; load it before the model is distributed")
            with torch.no_grad():
                self.values.copy_(spread(values, self.values))
            if kept is not None:
                self.nonzeros.move(self.nonzeros.positions, self.nonzeros.base, kept)


def holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Parameter -> the modules that hold it, and as what."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


def compact(positions: Tensor, weight: Tensor) -> Tensor:
    """In half the memory, where they fit."""
    return positions.int() if weight.numel() < 1 << 31 else positions


def whole(values: Tensor) -> Tensor:
    """Also where FSDP has given each process a part."""
    full: Callable[[], Tensor] | None = getattr(values, "full_tensor", None)
    return values if full is None else full()


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as FSDP has another."""
    if not hasattr(like, "full_tensor"):
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
