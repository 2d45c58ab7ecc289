"""Where a live model has its tensors, and whether it still has them there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A place in a model: a mapping, and a name in it.

    Attributes:
        things: the model itself, or a module's parameters, buffers or modules.
        name: the name there.
    """

    things: Mapping[str, Any]
    name: str

    def now(self) -> Any:
        """What is there now; None for nothing."""
        return self.things.get(self.name)


class Places:
    """All places of a model, as it was when this was made.

    Args:
        model: a torch module, or a mapping of names to tensors, arrays and modules.
    """

    def __init__(self, model: Any) -> None:
        self._model = None if isinstance(model, Mapping) else model
        self._of: dict[int, list[Place]] = {}  # id of a tensor or module -> where it is
        self._ways: dict[int, int] = {}  # id of a mapping -> how many ways lead to it
        self._owners: dict[int, Any] = {}  # id of a mapping -> the module that has it; None for the model
        if isinstance(model, Mapping):
            # A mapping that makes its values anew each time keeps none of them.
            values = {name: value for name, value in model.items() if model.get(name) is value}
            self._add(None, model, values)
        for root in modules_of(model):
            for module in root.modules():
                for things in (module._parameters, module._buffers, module._modules):
                    self._add(module, things, things)

    def _add(self, owner: Any, things: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._owners[id(things)] = owner
        for name, value in values.items():
            if value is not None:
                self._of.setdefault(id(value), []).append(Place(things, name))

    def of(self, thing: Any) -> list[Place]:
        """All places of a tensor or module."""
        return self._of.get(id(thing), [])

    def ways(self, place: Place) -> int:
        """How many ways lead from the model to a place: several, if modules are shared; none, if it is not there."""
        mapping = id(place.things)
        if mapping not in self._owners:
            return 0
        if mapping not in self._ways:
            owner = self._owners[mapping]
            self._ways[mapping] = 0  # modules may be in circles
            is_root = owner is None or owner is self._model
            self._ways[mapping] = int(is_root) + sum(self.ways(above) for above in self.of(owner))
        return self._ways[mapping]

    def above(self, places: Iterable[Place]) -> Iterator[tuple[Place, Any]]:
        """The modules that these places are in, up to the model, each with every place of it."""
        seen: set[int] = set()
        todo = list(places)
        while todo:
            owner = self._owners.get(id(todo.pop().things))
            if owner is not None and id(owner) not in seen:
                seen.add(id(owner))
                todo += self.of(owner)
                yield from ((place, owner) for place in self.of(owner))


def modules_of(model: Any) -> list[Any]:
    """The torch modules that a model is, or consists of."""
    return [value for value in (model.values() if isinstance(model, Mapping) else [model]) if is_module(value)]


def is_module(value: Any) -> bool:
    """Whether the value is a torch module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
