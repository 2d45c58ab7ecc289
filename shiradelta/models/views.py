"""Boxes of elements that tensors of a checkpoint share with weights in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from shiradelta.format.arithmetic import Positions
from shiradelta.models.names import Shape
from shiradelta.util.arrays import order_of

#: Candidates that are tried before boxes count as overlapping; two boxes of a weight take some ten.
_WORK = 1 << 20
#: An address; any would do.
_NOWHERE = 1 << 40
#: Positions below are computed with in 32 bits.
_NARROW = 1 << 32


@dataclass(frozen=True)
class Box:
    """A strided box of a flat array.

    Attributes:
        shape: its dimensions.
        strides: in elements of the array.
        offset: index of the first element in the array.
    """

    shape: Shape
    strides: Shape
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """(index of the first element in the array, index after the last one)."""
        reach = sum(stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True))
        return self.offset, self.offset + (reach + 1 if self.numel else 0)

    def of(self, flat: Any) -> Any:
        """The box of a flat NumPy array, as a view."""
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)

    def overlaps(self, other: Box) -> bool:
        """Whether an element of the array lies in both boxes, or that takes too long to tell."""
        try:  # NumPy's stubs know two values of `max_work` only
            return np.shares_memory(self._as_bytes(), other._as_bytes(), max_work=_WORK)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True

    def _as_bytes(self) -> Any:
        """The box as that of an array of bytes, which is nowhere and must not be read."""

        class Bytes:
            __array_interface__: ClassVar = {
                "version": 3,
                "typestr": "|u1",
                "data": (_NOWHERE + self.offset, True),
                "shape": self.shape,
                "strides": self.strides,
            }

        return np.asarray(Bytes())

    def positions(self, at: Positions) -> Positions:
        """Positions in the array, given positions in the box, in the same order."""
        where = np.full_like(at, self.offset)
        for index, stride in zip(np.unravel_index(at, self.shape) if self.shape else (), self.strides, strict=True):
            where += index * stride
        return where


def contiguous(shape: Shape) -> Box:
    """The box of a whole array, row by row."""
    return Box(shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))


@dataclass(frozen=True)
class View:
    """Elements that a tensor of the checkpoint shares with a weight: all of its own, or a part.

    Attributes:
        name: the tensor's name in the checkpoint.
        shape: the tensor's shape there.
        weight: the elements in the flat weight.
        stored: the same elements, in the same order, in the flat tensor of the checkpoint.
        numel: number of elements of the weight.
    """

    name: str
    shape: Shape
    weight: Box
    stored: Box
    numel: int

    @property
    def is_same(self) -> bool:
        """Whether the weight is the tensor as it is, element by element; it may be renamed."""
        return self.numel == self.weight.numel and self.weight == self.stored == contiguous(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the weight has all elements of the tensor."""
        return self.weight.numel == math.prod(self.shape)

    def reversed(self, name: str, shape: Shape) -> View:
        """The same elements, with the tensor in the weight's place and the weight in the tensor's.

        Args:
            name: what the weight is called in the checkpoint.
            shape: its shape.
        """
        return View(name, shape, self.stored, self.weight, math.prod(self.shape))

    def turned(self, dims: tuple[int, int]) -> View:
        """The view of a weight that is stored with two dimensions exchanged, given that of one that is stored as is."""
        one, other = dims
        shape, strides = list(self.shape), list(range(len(self.shape)))
        shape[one], shape[other] = shape[other], shape[one]
        strides[one], strides[other] = other, one
        box = contiguous(tuple(shape))
        stored = Box(self.shape, tuple(box.strides[dim] for dim in strides))
        return View(self.name, box.shape, self.weight, stored, self.numel)

    def from_weight(self, positions: Positions) -> tuple[Positions, Positions]:
        """Finds the positions of a weight that belong to the view.

        Returns:
            (their indices in `positions`, in the order of the checkpoint's tensor; their positions in that tensor).
        """
        if self.is_same:
            return np.arange(positions.size), positions
        return _sorted(*move(positions, self.weight, self.stored), positions.size)

    def to_weight(self, positions: Positions) -> tuple[Positions, Positions]:
        """Finds the positions of the checkpoint's tensor that belong to the view.

        Returns:
            (their indices in `positions`, in the order of the weight; their positions in the weight).
        """
        if self.is_same:
            return np.arange(positions.size), positions
        return _sorted(*move(positions, self.stored, self.weight), positions.size)


def show_nothing(views: Sequence[View]) -> bool:
    """Whether views of one another, the tensor's own first, surely have no element of the tensor in common."""
    return any(not view.weight.numel for view in views) or any(
        not upper.weight.overlaps(lower.stored) for upper, lower in pairwise(views)
    )


def move(positions: Any, source: Box, target: Box) -> tuple[Any, Any]:
    """Finds positions of one box in another box that has the same elements.

    Args:
        positions: in the array of `source`, int64; a NumPy array or a torch tensor.
        source: the box that they are in.
        target: the other box.

    Returns:
        (indices of those that lie in `source`, or the slice of all; their positions in the array of `target`), both
        in the order of `positions`.
    """
    (start, end), (_, end_there) = source.span, target.span
    rest = positions - start
    chosen, rest = _those(_are_below(rest, end - start), rest)
    shift = shift_between(source, target)
    if shift is not None:
        return chosen, rest + (start + shift)
    if isinstance(rest, np.ndarray) and max(end, end_there) <= _NARROW:
        rest = rest.astype(np.uint32)  # halves the time of what follows
    where: Any = None
    inside: Any = None
    # Divides by one stride after the other, the largest first; no element of a box has two positions.
    for number, (size, step, step_there) in enumerate(_dimensions(source, target)):
        index = rest // step if step > 1 else rest
        rest = rest - index * step if step > 1 else None
        if number or end - start > step * size:  # otherwise the span has told
            inside = index < size if inside is None else inside & (index < size)
        reach = index * step_there if step_there > 1 else index
        where = reach if where is None else where + reach
    if rest is not None:
        inside = rest == 0 if inside is None else inside & (rest == 0)
    some, where = (slice(None), where) if inside is None else _those(inside, where)
    if isinstance(where, np.ndarray):
        where = where.astype(np.int64, copy=False)
    if target.offset:
        where = where + target.offset
    return (some if isinstance(chosen, slice) else chosen[some]), where


def shift_between(source: Box, target: Box) -> int | None:
    """What is added to positions of one box to find them in the other, if neighbours are neighbours in both."""
    if any(dimension[1:] != (1, 1) for dimension in _dimensions(source, target)):
        return None
    return target.offset - source.offset


def _are_below(numbers: Any, end: int) -> Any:
    """Whether integers lie in [0, end)."""
    if isinstance(numbers, np.ndarray):
        return numbers.view(np.uint64) < end
    return (numbers >= 0) & (numbers < end)


def _those(mask: Any, numbers: Any) -> tuple[Any, Any]:
    """(indices of those that a mask chooses, or the slice of all; their numbers)."""
    if mask.all():
        return slice(None), numbers
    chosen = np.flatnonzero(mask) if isinstance(mask, np.ndarray) else mask.nonzero()[:, 0]
    return chosen, numbers[chosen]


def _dimensions(source: Box, target: Box) -> list[tuple[int, int, int]]:
    """(size, stride in one box, stride in the other) of the fewest dimensions; the largest stride comes first."""
    every = sorted(zip(source.shape, source.strides, target.strides, strict=True), key=lambda one: -one[1])
    found: list[tuple[int, int, int]] = []
    for size, step, there in every:
        if size == 1:
            continue
        if found and found[-1][1:] == (step * size, there * size):
            size *= found.pop()[0]
        found.append((size, step, there))
    return found


def _sorted(chosen: Any, where: Positions, count: int) -> tuple[Positions, Positions]:
    """What `move` gives of `count` positions, in the order of the other box."""
    indices = np.arange(count)[chosen]
    if np.all(where[1:] > where[:-1]):
        return indices, where
    order = order_of(where)
    return indices[order], where[order]


def whole_view(name: str, shape: Shape) -> View:
    """The view of a weight that is stored as it is."""
    box = contiguous(shape)
    return View(name, shape, box, box, box.numel)
