"""LoRA modules whose weights the base stores in another form: stacked, split, transposed, or together with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from shiradelta.format.arithmetic import Array, Float32
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted
from shiradelta.models.views import Box, View
from shiradelta.select.topk import Rows, row_shape

from . import dora
from .item import Item, Skipped, SkipReason, Source, not_addable

#: Changes that are kept in memory: a stacked weight is stored as many tensors, one after the other.
_KEPT = 2


@dataclass(frozen=True)
class Change:
    """The change of one module's weight.

    Attributes:
        rows: opens it.
        shape: its shape.
        adds_up: whether it may be added to another change of the same elements.
    """

    rows: Callable[[], Rows]
    shape: tuple[int, ...]
    adds_up: bool = True


def rescaled(
    module: str, change: Change, where: Converted, base: Checkpoint, source: Checkpoint, lengths: str, swap: bool
) -> Change | Skipped:
    """The change of a DoRA: its lengths are those of the whole weight in memory, of which the base may have parts.

    Args:
        module: its name.
        change: that of its factors.
        where: where the base has its weight.
        base: the base's checkpoint.
        source: the adapter's checkpoint.
        lengths: the key of its lengths there.
        swap: whether the weight in memory is [in, out].
    """
    if (found := _problem(change.shape, where, base, ())) is not None:
        return found
    dtypes = {base[view.name].dtype.name for view in where.views}
    held = np.zeros(math.prod(where.shape), bool)
    for view in where.views:
        view.weight.of(held)[...] = True
    if len(dtypes) > 1 or not held.all():
        why = "is a DoRA of a weight that the base has in part only, or in several dtypes; merge it first"
        return Skipped(SkipReason.UNSUPPORTED, why)
    item = Item(module, change.shape, dtypes.pop(), change.rows, base_bits=partial(_gathered, where, base))
    made = dora.changed(item, source, lengths, swap)
    if isinstance(made, Skipped):
        return made
    assert made.dense is not None
    return Change(made.dense, made.shape, adds_up=False)


def _gathered(where: Converted, base: Checkpoint) -> Array:
    """A weight as it is in memory, put together of the base's tensors."""
    whole = np.zeros(math.prod(where.shape), base[where.views[0].name].dtype.bits)
    for view in where.views:
        view.weight.of(whole)[...] = view.stored.of(base.bits(view.name))
    return whole


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

    for module in _clashing(changes, parts, base):
        result.skipped[module] = dora.SHARED
        parts = {name: kept for name, some in parts.items() if (kept := [one for one in some if one[0] != module])}
    opened = lru_cache(_KEPT)(lambda module: changes[module].rows())
    for name, some in parts.items():
        slot = base[name]
        held = [
            (view, partial(_part, partial(opened, module), changes[module].shape, view.weight)) for module, view in some
        ]
        dense = partial(_assembled, slot.shape, held)
        result.items.append(Item(name, slot.shape, slot.dtype.name, dense, base_bits=partial(base.bits, name)))


def _clashing(
    changes: Mapping[str, Change], parts: Mapping[str, Sequence[tuple[str, View]]], base: Checkpoint
) -> list[str]:
    """The modules whose changes do not add up with those of others to the same elements."""
    found: dict[str, None] = {}
    for name, some in parts.items():
        own = [(module, view) for module, view in some if not changes[module].adds_up]
        for module, view in own if len(some) > 1 else ():
            others = np.zeros(base[name].numel, bool)
            for other, seen in some:
                if other != module:
                    seen.stored.of(others)[...] = True
            if view.stored.of(others).any():
                found[module] = None
    return list(found)


def _problem(shape: tuple[int, ...], where: Converted, base: Checkpoint, taken: Container[str]) -> Skipped | None:
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
