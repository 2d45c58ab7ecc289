"""One weight that is tuned, in one process or in FSDP's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError
from shiradelta.patched import Place, flat, is_spread

from .layout import View

#: What the values are called beside their weight: `q_proj.weight` has `q_proj.weight_nonzeros`.
SUFFIX = "_nonzeros"


@dataclass
class Tuned:
    """One weight that is tuned.

    Attributes:
        place: where its nonzeros are.
        views: how the checkpoint has it.
        holders: modules that hold its values, tied ones more than one, and as what.
    """

    place: Place
    views: Sequence[View]
    holders: list[tuple[nn.Module, str]]

    @property
    def positions(self) -> Tensor:
        """Of what is trained."""
        return self.place.positions[self.place.kept]

    @property
    def values(self) -> nn.Parameter:
        """What is trained: float32, one for each nonzero, and where the density falls for those that were dropped."""
        module, name = self.holders[0]
        found = module._parameters[name]
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor | None:
        """None where FSDP gives each process a part of it, which holds the base; it is patched when it is gathered."""
        module, name = self.holders[0]
        found = module._parameters[name.removesuffix(SUFFIX)]
        return None if found is None or is_spread(found) else found

    def write(self, values: Tensor | None) -> None:
        """Puts base + values, or the base, into the weight."""
        weight = self.weight
        if weight is not None:
            self.place.written = None
            if values is None:
                self.place.write(None, weight)
            else:
                self.place.refresh(weight, values)

    @property
    def trained(self) -> Tensor:
        """Their values, whole; what averaging has made of those that were dropped is left out."""
        values = whole(self.values).detach().to(self.place.positions.device)
        return self.place.own(values)[self.place.kept]

    @property
    def base(self) -> Tensor:
        """The base's weights there."""
        return self.place.base[self.place.kept]

    def keep(self, kept: Tensor) -> None:
        """Drops all positions but those of a mask; the weight has the base until the next `write`."""
        self.write(None)
        self.place.narrow(kept)

    def clear(self) -> None:
        """Makes the values of what was dropped zero again, whatever an optimizer's momentum has made of them."""
        if self.place.dropped is not None:
            with torch.no_grad():
                self.values.masked_fill_(self.place.dropped.to(self.values.device), 0)

    def load(self, name: str, positions: Tensor, values: Tensor, kept: Tensor | None) -> None:
        """Takes up a state; of `kept` None is all."""
        weight = self.weight
        if weight is not None:
            self.write(None)
            where = positions.to(weight.device)
            self.place.move(compact(where, weight), flat(weight)[where], kept)
            every = self.place.spread(values.to(where.device, torch.float32, copy=True))
            self.values.data = every.to(self.values.device)
        else:
            if not torch.equal(positions, self.place.positions.long().cpu()):
                raise DeltaError(f"the state of {name!r} has another mask; load it before the model is distributed")
            with torch.no_grad():
                self.values.copy_(spread(values, self.values))


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
