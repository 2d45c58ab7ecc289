"""How tensors of a checkpoint lie in live memory, where a caller says so: `HotSwap(model, layout=...)`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.models.memory import address_of, is_contiguous, span_of, strides_of
from shiradelta.models.names import Shape
from shiradelta.models.views import Box, View, contiguous
from shiradelta.util.arguments import SHAPE, ArgumentKind
from shiradelta.util.text import brief


@dataclass(frozen=True)
class Region:
    """Elements of a checkpoint's tensor that a piece of live memory shows.

    Attributes:
        memory: a view of one of the model's tensors, such as `qkv_proj.weight[:4096]`, with any strides.  It has the
            dimensions of the checkpoint's tensor, in the same order.
        start: the index of the first element in the checkpoint's tensor; empty for 0 along each dimension.
        step: the distance of neighbours in the checkpoint's tensor; empty for 1 along each dimension.
    """

    memory: Any
    start: Sequence[int] = ()
    step: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Checks the types.  Raises ArgumentError."""
        if not all(hasattr(self.memory, one) for one in ("shape", "dtype", "itemsize")):
            raise ArgumentError(
                f"a region's memory is {brief(repr(self.memory), 80)}; give a view of a tensor or array"
            )
        for what in ("start", "step"):
            _check_whole(f"a region's {what}", getattr(self, what))

    def box(self, name: str, shape: Shape) -> Box:
        """The elements in the flat tensor of the checkpoint, which has this name and shape.

        Raises:
            ArgumentError: the region does not lie in the tensor.
        """
        sizes = tuple(self.memory.shape)
        start, step = tuple(self.start) or (0,) * len(shape), tuple(self.step) or (1,) * len(shape)
        if not len(sizes) == len(start) == len(step) == len(shape) or any(
            first < 0 or by < 1 or first + by * (size - 1) >= length
            for size, first, by, length in zip(sizes, start, step, shape, strict=True)
        ):
            raise ArgumentError(
                f"layout of tensor {name!r}: a region of shape {sizes} from {start} in steps of {step} does not lie in"
                f" a tensor of shape {shape}; give the place that the checkpoint's tensor has for it"
            )
        strides = contiguous(shape).strides
        steps = tuple(by * stride for by, stride in zip(step, strides, strict=True))
        return Box(sizes, steps, sum(first * stride for first, stride in zip(start, strides, strict=True)))


@dataclass(frozen=True)
class Layout:
    """How one tensor of a checkpoint lies in live memory.

    Attributes:
        shape: the tensor's shape in the checkpoint.
        regions: what this process has of it.  Regions may show the same elements, and all are written.
    """

    shape: Sequence[int]
    regions: Sequence[Region]

    def __post_init__(self) -> None:
        """Checks the types.  Raises ArgumentError."""
        _check_whole("a layout's shape", self.shape)
        if not isinstance(self.regions, Sequence) or not all(isinstance(one, Region) for one in self.regions):
            raise ArgumentError(f"a layout's regions are {brief(repr(self.regions), 80)}; give a list of Region")


def _check_whole(what: str, value: object) -> None:
    if not SHAPE.holds(value):
        raise ArgumentError(f"{what} is {brief(repr(value), 80)}; give whole numbers, one for each dimension")


#: An argument that says how tensors lie in memory.
LAYOUTS = ArgumentKind(
    "a mapping of names to shiradelta.models.layout.Layout",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(one, Layout) and isinstance(name, str) for name, one in value.items())
    ),
)
#: Name of a tensor in the checkpoint -> its shape there, and its elements: (name of a weight in memory, which of them).
Parts = dict[str, tuple[Shape, tuple[tuple[str, View], ...]]]


def parts_of(layouts: Mapping[str, Layout], weights: Mapping[str, Any]) -> Parts:
    """Finds the weights that regions of layouts are in.

    Args:
        layouts: name of a tensor in the checkpoint -> its layout.
        weights: the model's own tensors by name.

    Raises:
        ArgumentError: a region does not lie in the checkpoint's tensor.
        TargetError: a region is not part of a contiguous weight, shows one element of memory twice, or shares it with a
            region of other elements.
    """
    found: Parts = {}
    spans = {weight: span_of(tensor) for weight, tensor in weights.items() if 0 not in tensor.shape}
    for name, layout in layouts.items():
        shape = tuple(layout.shape)
        parts = []
        for region in layout.regions:
            stored = region.box(name, shape)
            if stored.numel:
                inside = span_of(region.memory)
                around = {weight: weights[weight] for weight, span in spans.items() if span.holds(inside)}
                weight = _owner(name, region.memory, around)
                whole = weights[weight]
                offset = (address_of(region.memory) - address_of(whole)) // region.memory.itemsize
                box = Box(stored.shape, strides_of(region.memory), offset)
                if _folds(box):
                    raise TargetError(
                        f"layout of tensor {name!r}: elements of a region share memory, as in an expanded view; give"
                        " each element memory of its own"
                    )
                parts.append((weight, View(name, shape, box, stored, math.prod(whole.shape))))
        found[name] = shape, tuple(parts)
    _check_apart((weight, view) for _, parts in found.values() for weight, view in parts)
    return found


def _folds(box: Box) -> bool:
    """Whether two elements may be at one place: a dimension's stride is less than what the smaller ones span."""
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(box.strides, box.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _owner(name: str, memory: Any, around: Mapping[str, Any]) -> str:
    """The weight that a region of a tensor's layout is in, of those around it; of several, the smallest."""
    fitting = [weight for weight, whole in around.items() if whole.dtype == memory.dtype and is_contiguous(whole)]
    if not fitting:
        why = f", but for {next(iter(around))!r}, which is not contiguous or of another dtype" if around else ""
        raise TargetError(
            f"layout of tensor {name!r}: a region lies in no tensor of the model{why}; give views of the model's own"
            " tensors"
        )
    return min(fitting, key=lambda weight: math.prod(around[weight].shape))


def _check_apart(parts: Iterable[tuple[str, View]]) -> None:
    """Checks that regions share no memory, but for those that are the same.

    Raises:
        TargetError: two do.
    """
    before: list[tuple[str, View]] = []  # those that reach this far
    for weight, view in sorted(parts, key=lambda part: (part[0], part[1].weight.span)):
        start, _ = view.weight.span
        before = [(other, one) for other, one in before if other == weight and one.weight.span[1] > start]
        for _, one in before:
            is_same = (one.shape, one.weight, one.stored) == (view.shape, view.weight, view.stored)
            if not is_same and one.weight.overlaps(view.weight):
                raise TargetError(
                    f"layouts of tensors {one.name!r} and {view.name!r} share elements of weight {weight!r}; give each"
                    " element one place in the checkpoint"
                )
        before.append((weight, view))
