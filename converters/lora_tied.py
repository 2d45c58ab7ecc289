"""LoRA modules of weights that the base ties, such as an output layer and an embedding: one tensor for all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import CONFIG
from shiradelta.select.topk import Rows

from . import dora
from .item import Item, Skipped, SkipReason
from .lora_keys import Module
from .lora_scale import Scale


class TiedModules:
    """Adds the changes of modules whose weights are one tensor, as PEFT does where it merges them.

    Args:
        source: the LoRA's checkpoint.
        modules: its modules.
        factors: module -> the factor on its product.
        tensors: module -> the name of its weight.
        tied: a weight's name -> the base's tensor that it is tied to.
        shared: the base's tensors of which the library makes several.
        scale: what the configuration says.
    """

    def __init__(
        self,
        source: Checkpoint,
        modules: Mapping[str, Module],
        factors: Mapping[str, float],
        tensors: Mapping[str, str],
        tied: Mapping[str, str],
        shared: Collection[str],
        scale: Scale,
    ) -> None:
        self._source, self._modules, self._factors, self._scale = source, modules, factors, scale
        self._tied = {module for module, tensor in tensors.items() if tensor in tied}
        self._shared = {*shared, *(tied[tensor] for tensor in tensors.values() if tensor in tied)}
        self._items: dict[str, Item] = {}  # the base's name -> the sum of the changes so far
        self._of: dict[str, list[str]] = {}  # the base's name -> the modules
        self._same: set[str] = set()  # modules whose change is another one's

    @property
    def items(self) -> list[Item]:
        """One item a tensor of the base."""
        return list(self._items.values())

    @property
    def warnings(self) -> list[str]:
        """Where the result differs from the adapter that is not merged, or from PEFT's merge."""
        warnings = []
        for name in self._shared.intersection(self._of):
            modules = " and ".join(self._of[name])
            if self._same.isdisjoint(self._of[name]):
                warnings.append(
                    f"{modules}: changes {name!r}, which several layers share in the base, so all of them change, as"
                    " where PEFT merges; an adapter that is not merged changes its own layers only"
                )
            else:
                warnings.append(
                    f"{modules}: share {name!r} and its change, which is added once, as the adapter runs; PEFT 0.21"
                    " adds it twice where it merges"
                )
        return warnings

    def add(self, module: str, item: Item) -> Skipped | None:
        """Adds a module's change to those of the same tensor; or says why it is left out."""
        before = self._of.get(item.name, [])
        if before and self._tied.isdisjoint([module, *before]):
            return Skipped(SkipReason.CONFLICT, f"another module changes {item.name!r} already")
        if before and any(self._modules[name].magnitudes for name in (module, *before)):
            return dora.SHARED
        if any(self._is_same(module, other) for other in before):
            self._same.add(module)
        elif before and self._scale.ties(module):
            return Skipped(
                SkipReason.CONFLICT,
                f"{CONFIG} says ensure_weight_tying, and its factors are not those of {before[0]!r}, which has the same"
                " weight; save the adapter with PEFT again",
            )
        else:
            self._items[item.name] = _sum(self._items[item.name], item) if before else item
        self._of.setdefault(item.name, []).append(module)
        return None

    def _is_same(self, module: str, other: str) -> bool:
        """Whether PEFT ties two modules' factors too (ensure_weight_tying), so that both layers have one change."""
        if not self._scale.ties(module) or self._factors[module] != self._factors[other]:
            return False
        one, two = (self._matrices(self._modules[name]) for name in (module, other))
        return one.keys() == two.keys() and all(np.array_equal(one[part], two[part]) for part in one)

    def _matrices(self, parts: Module) -> dict[str, Float32]:
        """A module's factors as those of a linear layer; an embedding's are the other way round."""
        read = {
            part: to_float32(self._source.bits(key), self._source[key].dtype.name).reshape(self._source[key].shape)
            for part, key in parts.keys.items()
        }
        if not parts.embedding:
            return read
        return {{"A": "B", "B": "A"}.get(part, part): matrix.T for part, matrix in read.items()}


def _sum(one: Item, two: Item) -> Item:
    """Both changes of a tensor."""
    assert one.dense is not None
    assert two.dense is not None
    return replace(one, dense=_added(one.dense, two.dense))


def _added(one: Callable[[], Rows], two: Callable[[], Rows]) -> Callable[[], Rows]:
    def opened() -> Rows:
        first, second = one(), two()

        def rows(start: int, stop: int) -> Float32:
            total: Float32 = first(start, stop) + second(start, stop)
            return total

        return rows

    return opened
