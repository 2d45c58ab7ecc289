"""LoRA modules whose weights the base stores in another form: stacked, split, transposed, or together with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from shiradelta.format.arithmetic import Float32
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted
from shiradelta.models.views import Box, View
from shiradelta.select.topk import Rows, row_shape

from .item import Item, Skipped, SkipReason, Source, not_addable

#: Changes that are kept in memory: a stacked weight is stored as many tensors, one after the other.
_KEPT = 2


@dataclass(frozen=True)
class Change:
    """The change of one module's weight.

    Attributes:
        rows: opens it.
        shape: its shape.
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
    for module, change in changes.items():
        where = stored[module]
        found = _problem(change.shape, where, base, taken)
        if found is not None:
            result.skipped[module] = found
            continue
        for view in where.views:
            parts.setdefault(view.name, []).append((module, view))

    opened = lru_cache(_KEPT)(lambda module: changes[module].rows())
    for name, some in parts.items():
        slot = base[name]
        held = [
            (view, partial(_part, partial(opened, module), changes[module].shape, view.weight)) for module, view in some
        ]
        dense = partial(_assembled, slot.shape, held)
        result.items.append(Item(name, slot.shape, slot.dtype.name, dense, base_bits=partial(base.bits, name)))


def _problem(shape: tuple[int, ...], where: Converted, base: Checkpoint, taken: set[str]) -> Skipped | None:
    """Why a module's weight cannot be changed."""
    if shape != where.shape:
        why = f"it changes a tensor of shape {list(shape)}, the model's has {list(where.shape)}"
        return Skipped(SkipReason.PARTS, why)
    for view in where.views:
        slot = base[view.name]
        if slot.shape != view.shape:
            why = f"the base's {view.name!r} has shape {list(slot.shape)}, not {list(view.shape)}"
            return Skipped(SkipReason.PARTS, why)
        if (refused := not_addable(view.name, slot)) is not None:
            return refused
        if view.name in taken:
            return Skipped(SkipReason.CONFLICT, f"another module changes {view.name!r} already")
    return None


def _part(opened: Callable[[], Rows], shape: tuple[int, ...], box: Box) -> Float32:
    """A box of a change, of which only the rows are made that it spans."""
    columns = row_shape(shape)[1]
    last = box.offset + sum((size - 1) * stride for size, stride in zip(box.shape, box.strides, strict=True))
    first = box.offset // columns
    rows = opened()(first, last // columns + 1)
    part: Float32 = replace(box, offset=box.offset - first * columns).of(rows.reshape(-1))
    return part


def _assembled(shape: tuple[int, ...], parts: Sequence[tuple[View, Callable[[], Float32]]]) -> Rows:
    """A tensor of the base, put together from the weights in memory that it holds."""
    count, columns = row_shape(shape)
    whole = np.zeros(count * columns, np.float32)
    for view, part in parts:
        view.stored.of(whole)[...] += part()  # tied weights share elements
    matrix = whole.reshape(count, columns)
    return lambda start, stop: matrix[start:stop]
