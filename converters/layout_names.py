"""Finds the tensors of a diffusion transformer in a checkpoint of the other layout, as `diffusion_layouts` says.

Every name of diffusers is located first, in its own tensor or in a part of an original one.  Original names, and other
names of adapters, are put together of those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shiradelta.models.library import Converted
from shiradelta.models.names import Shape
from shiradelta.models.views import Box, View, contiguous, whole_view

from .diffusion_layouts import LAYOUTS, Halves, ModelLayout

#: Ends of the names of a module's tensors.
_ENDS = (".weight", ".bias")


def other_names(shapes: Mapping[str, Shape]) -> dict[str, str | Converted]:
    """The names that a model's tensors have in the other layout, or for adapters -> where the checkpoint has them.

    Args:
        shapes: the checkpoint's names, without what stands before the model's -> shapes.
    """
    for layout in LAYOUTS.values():
        original = _any(layout.original, shapes)
        if original or _any(layout.library, shapes):
            return _names(layout, shapes, original)
    return {}


def without_prefix(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """The names that begin with a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def with_prefix(names: Mapping[str, str | Converted], prefix: str) -> dict[str, str | Converted]:
    """The same names, of tensors whose names in the checkpoint begin with a prefix."""

    def put(where: str | Converted) -> str | Converted:
        if isinstance(where, str):
            return prefix + where
        return Converted(where.shape, tuple(replace(view, name=prefix + view.name) for view in where.views))

    return {name: put(where) for name, where in names.items()}


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(map(re.compile(pattern).fullmatch, names))


def _names(layout: ModelLayout, shapes: Mapping[str, Shape], original: bool) -> dict[str, str | Converted]:
    located = dict(_split(layout, shapes)) if original else {}
    located = {name: Converted(shape, (whole_view(name, shape),)) for name, shape in shapes.items()} | located
    found = dict(located)
    for name, parts in _joined(layout, located, shapes):
        found.setdefault(name, parts)
    return {name: _plain(where) for name, where in found.items() if name not in shapes}


def _plain(where: Converted) -> str | Converted:
    """The tensor's name, if it is the tensor as it is."""
    view = where.views[0]
    return view.name if len(where.views) == 1 and view.is_same else where


def _rows(layout: ModelLayout) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(original name, diffusers' names, ends of both) of modules and tensors."""
    for old, new in {**layout.modules, **layout.parts}.items():
        yield old, (new,) if isinstance(new, str) else new, _ENDS
    for old, name in layout.tensors.items():
        yield old, (name,), ("",)


def _split(layout: ModelLayout, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Converted]]:
    """diffusers' names -> where the original tensors have their elements."""
    for old, new, ends in _rows(layout):
        pattern = _pattern(old, ends)
        for name, shape in shapes.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            *numbers, end = match.groups()
            start = 0
            inputs = shapes.get(name.removesuffix(end) + ".weight", shape)[1:2]
            for part, size in zip(new, _sizes(len(new), shape, inputs), strict=True):
                view = _part(name, shape, start, size)
                yield _filled(part, numbers) + end, _exchanged(view) if _is_exchanged(part, shape, inputs) else view
                start += size


def _joined(
    layout: ModelLayout, located: Mapping[str, Converted], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Converted]]:
    """Original names and adapters' that the checkpoint lacks -> the elements of diffusers' that make them."""
    for old, new, ends in _rows(layout):
        pattern = _pattern(new[0], ends)
        for name, first in located.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            *numbers, end = match.groups()
            if _filled(old, numbers) + end in shapes:
                continue
            parts = [located.get(_filled(part, numbers) + end) for part in new]
            there = [part for part in parts if part is not None and part.shape[1:] == first.shape[1:]]
            if len(there) < len(parts):
                continue
            inputs = located[weight].shape[1:2] if (weight := name.removesuffix(end) + ".weight") in located else ()
            whole = _below(there)
            yield (
                _filled(old, numbers) + end,
                _exchanged(whole) if _is_exchanged(new[0], whole.shape, inputs) else whole,
            )


def _pattern(name: str, ends: Sequence[str]) -> re.Pattern[str]:
    """What matches a name, with a group for each number and one for the end."""
    numbered = r"(\d+)".join(map(re.escape, name.split("{}")))
    return re.compile(f"{numbered}({'|'.join(map(re.escape, ends))})")


def _filled(name: str, numbers: Sequence[str]) -> str:
    return str(name).format(*numbers)


def _is_exchanged(name: str, shape: Shape, inputs: Shape) -> bool:
    return isinstance(name, Halves) and bool(inputs) and shape[0] == 2 * inputs[0]


def _sizes(count: int, shape: Shape, inputs: Shape) -> list[int]:
    """Rows of each part of a tensor: queries have as many as the layer has inputs, keys and values are alike."""
    if count == 1:
        return [shape[0]]
    hidden = inputs[0] if inputs else 0
    if count == 3:
        rest = shape[0] - hidden
        return [hidden, rest // 2, rest - rest // 2] if 0 < hidden < shape[0] else [0, 0, 0]
    return [hidden] * (count - 1) + [max(shape[0] - hidden * (count - 1), 0)]


def _part(name: str, shape: Shape, start: int, size: int) -> Converted:
    """Rows of a tensor."""
    part = (size, *shape[1:])
    box, width = contiguous(part), math.prod(shape[1:])
    return Converted(part, (View(name, shape, box, Box(part, box.strides, start * width), box.numel),))


def _below(parts: Sequence[Converted]) -> Converted:
    """Weights one below the other, as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    views, start = [], 0
    for part in parts:
        views += [_moved(view, start, math.prod(shape)) for view in part.views]
        start += math.prod(part.shape)
    return Converted(shape, tuple(views))


def _moved(view: View, by: int, numel: int) -> View:
    """A view of a weight that is a part of another, whose elements begin `by` after that one's."""
    box = Box(view.weight.shape, view.weight.strides, view.weight.offset + by)
    return View(view.name, view.shape, box, view.stored, numel)


def _exchanged(where: Converted) -> Converted:
    """A weight whose halves are exchanged, of a weight that is in one tensor as it is."""
    (view,) = where.views
    half = (where.shape[0] // 2, *where.shape[1:])
    box, numel = contiguous(half), math.prod(where.shape)

    def one(from_: int, to: int) -> View:
        stored = Box(half, box.strides, view.stored.offset + from_)
        return View(view.name, view.shape, Box(half, box.strides, to), stored, numel)

    return Converted(where.shape, (one(0, box.numel), one(box.numel, 0)))
