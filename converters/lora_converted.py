"""LoRA modules whose weights the base stores in another form: stacked, split, transposed, or together with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from shiradelta.format.arithmetic import Float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted
from shiradelta.models.views import View
from shiradelta.select.topk import Rows, row_shape

from .item import Item, Skipped, SkipReason, Source

#: Changes that are kept in memory: a stacked weight is stored as many tensors, one after the other.
_KEPT = 2


@dataclass(frozen=True)
class Change:
    """The change of one module's weight.

    Attributes:
        rows: opens it, in the factors' order of dimensions.
        shape: its shape in that order.
    """

    rows: Callable[[], Rows]
    shape: tuple[int, ...]


def add_converted(
    changes: Mapping[str, Change], stored: Mapping[str, Converted], base: Checkpoint, result: Source
) -> None:
    """Adds the tensors of the base that hold the elements of modules' weights.

    Args:
        changes: module -> its change.
        stored: module -> where the base has its weight.
        base: the base's checkpoint.
        result: where items and skipped modules go.
    """
    taken = {item.name for item in result.items}
    parts: dict[str, list[tuple[str, View]]] = {}
    for module, where in stored.items():
        found = _problem(module, changes[module].shape, where, base, taken)
        if found is not None:
            result.skipped[module] = found
            continue
        for view in where.views:
            parts.setdefault(view.name, []).append((module, view))

    @lru_cache(_KEPT)
    def flat(module: str) -> Float32:
        """A module's change in the order of its weight in memory."""
        shape = changes[module].shape
        whole = changes[module].rows()(0, row_shape(shape)[0]).reshape(shape)
        return np.ascontiguousarray(whole if shape == stored[module].shape else whole.T).reshape(-1)

    for name, some in parts.items():
        slot = base[name]
        dense = partial(_assembled, slot.shape, some, flat)
        result.items.append(Item(name, slot.shape, slot.dtype.name, dense, base_bits=partial(base.bits, name)))


def _problem(
    module: str, shape: tuple[int, ...], where: Converted, base: Checkpoint, taken: set[str]
) -> Skipped | None:
    """Why a module's weight cannot be changed."""
    if shape not in (where.shape, where.shape[::-1]):
        why = f"it changes a tensor of shape {list(shape)}, the model's has {list(where.shape)}"
        return Skipped(SkipReason.PARTS, why)
    for view in where.views:
        slot = base[view.name]
        if slot.shape != view.shape:
            why = f"the base's {view.name!r} has shape {list(slot.shape)}, not {list(view.shape)}"
            return Skipped(SkipReason.PARTS, why)
        if slot.dtype.name not in ADD_DTYPES:
            why = f"the base stores {view.name!r} as {slot.dtype.name}, to which nothing can be added exactly"
            return Skipped(SkipReason.DTYPE, why)
        if view.name in taken:
            return Skipped(SkipReason.CONFLICT, f"another module changes {view.name!r} already")
    return None


def _assembled(shape: tuple[int, ...], parts: Sequence[tuple[str, View]], flat: Callable[[str], Float32]) -> Rows:
    """A tensor of the base, put together from the weights in memory that it holds."""
    count, columns = row_shape(shape)
    whole = np.zeros(count * columns, np.float32)
    for module, view in parts:
        view.stored.of(whole)[...] = view.weight.of(flat(module))
    matrix = whole.reshape(count, columns)
    return lambda start, stop: matrix[start:stop]
