"""Where a live model has its tensors, and whether it still has them there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
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


class Things:
    """Things that a model has in places of it.

    Args:
        mappings: what each of them is in.
        names: its name there.
        things: the thing itself.
    """

    def __init__(self, mappings: Sequence[Mapping[str, Any]], names: Sequence[str], things: Sequence[Any]) -> None:
        self._mappings, self._names, self._things = mappings, names, things
        self._get: Any = dict.get if all(issubclass(kind, dict) for kind in set(map(type, mappings))) else Mapping.get

    @classmethod
    def distinct(cls, places: Sequence[Place], things: Sequence[Any]) -> Things:
        """What is in each of these places, of which each counts once."""
        every = cls([place.things for place in places], [place.name for place in places], things)
        last = dict(zip(zip(map(id, every._mappings), every._names, strict=True), range(len(places)), strict=True))
        return every if len(last) == len(places) else every.some(list(last.values()))

    def some(self, numbers: Sequence[int]) -> Things:
        """Those of some numbers."""
        columns = self._mappings, self._names, self._things
        return Things(*(list(map(column.__getitem__, numbers)) for column in columns))

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
        self._above: dict[frozenset[int], Things] = {}  # ids of mappings -> the modules above, as was asked last
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
        """All modules, each in every place of it."""
        pairs = [(place, module) for module in self._modules for place in self.of(module)]
        places = [place for place, _ in pairs]
        return Things([place.things for place in places], [place.name for place in places], [one for _, one in pairs])

    @cached_property
    def _steps(self) -> dict[int, tuple[range, list[int]]]:
        """Id of a module -> (its numbers in `_placed`, ids of the modules that it is in)."""
        found, start = {}, 0
        for module in self._modules:
            places = self.of(module)
            owners = [self._owners[id(place.things)] for place in places]
            found[id(module)] = range(start, start + len(places)), [id(one) for one in owners if one is not None]
            start += len(places)
        return found

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

    def above(self, places: Iterable[Place]) -> Things:
        """The modules that these places are in, up to the model, each in every place of it."""
        mappings = frozenset([id(things) for things, _ in places])
        if mappings not in self._above:  # adapters of one kind mostly have the same
            self._above = {mappings: self._above_mappings(mappings)}
        return self._above[mappings]

    def _above_mappings(self, mappings: Iterable[int]) -> Things:
        found: set[int] = set()
        todo = {id(self._owners.get(mapping)) for mapping in mappings} - {id(None)}
        while todo:
            found |= todo
            todo = set(chain.from_iterable([self._steps[owner][1] for owner in todo])) - found
        numbers = list(chain.from_iterable([self._steps[owner][0] for owner in found]))
        return self._placed.some(numbers)


#: What a module has its parameters, buffers and modules in.
_OWN = attrgetter("_parameters", "_buffers", "_modules")


def modules_of(model: Any) -> list[Any]:
    """The torch modules that a model is, or consists of."""
    return [value for value in (model.values() if isinstance(model, Mapping) else [model]) if is_module(value)]


def is_module(value: Any) -> bool:
    """Whether the value is a torch module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
