"""Where a live model has its tensors, and whether it still has them there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from operator import attrgetter, is_
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


class Things:
    """Things that a model has in places of it; each place counts once."""

    def __init__(self, found: Iterable[tuple[Place, Any]]) -> None:
        distinct = {(id(place.things), place.name): (place, thing) for place, thing in found}
        self._mappings = [place.things for place, _ in distinct.values()]
        self._names = [place.name for place, _ in distinct.values()]
        self._things = [thing for _, thing in distinct.values()]
        self._get: Any = dict.get if all(isinstance(one, dict) for one in self._mappings) else Mapping.get

    def are_there(self) -> bool:
        """Whether all are still there."""
        return all(map(is_, map(self._get, self._mappings, self._names), self._things))


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
        self._modules: list[Any] = []
        self._mappings: list[Mapping[str, Any]] = []  # what each module has its things in, one after the other
        if isinstance(model, Mapping):
            # A mapping that makes its values anew each time keeps none of them.
            values = {name: value for name, value in model.items() if model.get(name) is value}
            self._add(None, model, values)
        for root in modules_of(model):
            for module in root.modules():
                own = _OWN(module)
                self._modules.append(module)
                self._mappings += own
                for things in own:
                    self._add(module, things, things)

    def _add(self, owner: Any, things: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._owners[id(things)] = owner
        for name, value in values.items():
            if value is not None:
                self._of.setdefault(id(value), []).append(Place(things, name))

    @cached_property
    def _placed(self) -> Things:
        return Things((place, module) for module in self._modules for place in self.of(module))

    def has_same_modules(self) -> bool:
        """Whether the model still has all modules that it had, each wherever it was."""
        now = chain.from_iterable(map(_OWN, self._modules))
        return self._placed.are_there() and all(map(is_, now, self._mappings))

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


#: What a module has its parameters, buffers and modules in.
_OWN = attrgetter("_parameters", "_buffers", "_modules")


def modules_of(model: Any) -> list[Any]:
    """The torch modules that a model is, or consists of."""
    return [value for value in (model.values() if isinstance(model, Mapping) else [model]) if is_module(value)]


def is_module(value: Any) -> bool:
    """Whether the value is a torch module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
