"""Where a serving engine has the tensors of a checkpoint: its own loader is run, and its copies are recorded, not made.

Engines fuse weights, shard them, pad and copy them when they load a model, each layer in its own way.  No table of
these ways is kept here.  The loader is given tensors without elements, and every copy that it makes from a piece of one
to a piece of the model's memory says where the one is the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shiradelta.errors import TargetError
from shiradelta.models.compatibility import TensorSpec
from shiradelta.models.layout import Layout, Region
from shiradelta.models.names import Shape
from shiradelta.models.views import Box
from shiradelta.util.text import brief

#: What a loader does to a tensor before it copies it, and what changes no element.
_SAME = (Tensor.to, Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach)
#: How loaders write padding.
_FILLS = (Tensor.fill_, Tensor.zero_)
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Copied(Region):
    """A region whose elements are known by their box in the checkpoint's tensor."""

    stored: Box = field(default_factory=lambda: Box((), ()))

    def box(self, name: str, shape: Shape) -> Box:
        return self.stored


class ServedModel(Protocol):
    """A model of a serving engine: a torch module with a loader, as vLLM and SGLang have them."""

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> object:
        """Copies a checkpoint's tensors to where the model has them."""

    def modules(self) -> Iterator[Any]:
        """All modules."""


def recorded_layout(model: ServedModel, tensors: Mapping[str, TensorSpec]) -> dict[str, Layout]:
    """Finds where an engine has the tensors of a checkpoint, by running its loader without copying anything.

    Args:
        model: the engine's model, in this process.
        tensors: the checkpoint's tensors by name.

    Returns:
        Name -> its layout, for `HotSwap(model, layout=...)`.  A tensor that the loader leaves out, or whose elements it
        computes, has none; scalars have none.

    Raises:
        TargetError: the loader cannot be followed: it reads elements or replaces weights, or layers were repacked.
    """
    stand_ins: dict[int, tuple[str, Tensor]] = {}
    for name, spec in tensors.items():
        if math.prod(spec.shape) > 1:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            stand_ins[tensor.untyped_storage()._cdata] = name, tensor
    recording = _Recording(stand_ins)
    before = [(things, dict(things)) for module in model.modules() for things in (module._parameters, module._buffers)]
    try:
        with torch.no_grad(), recording:
            model.load_weights(iter(stand_ins.values()))
        why = "it replaces weights" if any(_differ(now, was) for now, was in before) else None
    except Exception as error:
        why = f"{type(error).__name__}: {brief(str(error), 120)}"
    if why is not None:
        for now, was in before:
            now.clear()
            now.update(was)
        raise TargetError(
            f"the engine's loader cannot be followed ({why}), for it reads elements, or layers were repacked after"
            " loading; apply the delta to the checkpoint (shiradelta apply) and load that"
        )
    return {
        name: Layout(tensors[name].shape, regions)
        for name, regions in recording.regions.items()
        if name not in recording.computed
    }


def _differ(now: Mapping[str, object], was: Mapping[str, object]) -> bool:
    return now.keys() != was.keys() or any(now[name] is not was[name] for name in was)


class _Recording(TorchFunctionMode):
    """Records copies instead of making them.

    Attributes:
        regions: name of a checkpoint's tensor -> where its elements were copied to.
        computed: tensors whose elements were not copied as they are.
    """

    def __init__(self, stand_ins: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self._stand_ins = stand_ins
        self._derived: dict[int, tuple[set[str], Tensor]] = {}  # storages that were computed from stand-ins
        self.regions: dict[str, list[Region]] = {}
        self.computed: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SAME and self._names_of(args[0]):
            return args[0]
        if function in _FILLS and not args[0].is_meta:
            return args[0]  # padding is there already
        if function == _SET_DATA:
            raise TypeError("it replaces weights")
        if function is Tensor.copy_:
            return self._copy(args[0], args[1] if len(args) > 1 else kwargs["src"])
        if function is Tensor.__setitem__ and self._names_of(args[2]):
            # Read under the mode: what is no view of the same memory is no place to copy to.
            self._copy(args[0][args[1]], args[2], args[0])
            return None
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta and not self._names_of(result):
            names = set().union(*(self._names_of(one) for one in _tensors((*args, *kwargs.values()))))
            if names:
                self._derived[result.untyped_storage()._cdata] = names, result
        return result

    def _names_of(self, value: Any) -> set[str]:
        """The checkpoint's tensors that a tensor's elements come from."""
        if not isinstance(value, Tensor) or not value.is_meta:
            return set()
        storage = value.untyped_storage()._cdata
        if storage in self._stand_ins:
            return {self._stand_ins[storage][0]}
        return self._derived[storage][0] if storage in self._derived else set()

    def _copy(self, target: Tensor, source: Tensor, whole: Tensor | None = None) -> Tensor:
        names = self._names_of(source)
        if not names:
            return target.copy_(source)
        storage = source.untyped_storage()._cdata
        is_same = storage in self._stand_ins and source.dtype == target.dtype and not target.is_meta
        if whole is not None and target.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            is_same = False
        if is_same and source.shape != target.shape:
            source = source.expand(target.shape)
            is_same = 0 not in source.stride()
        if is_same:
            box = Box(tuple(source.shape), tuple(source.stride()), int(source.storage_offset()))
            (name,) = names
            self.regions.setdefault(name, []).append(_Copied(target.detach(), stored=box))
        else:
            self.computed |= names
        return target


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
