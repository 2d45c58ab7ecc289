"""Boxes of elements that tensors of a checkpoint share with weights in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shiradelta.format.arithmetic import Positions
from shiradelta.models.names import Shape

#: Candidates that are tried before boxes count as overlapping; two boxes of a weight take some ten.
_WORK = 1 << 20
#: An address; any would do.
_NOWHERE = 1 << 40


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

    def inside(self, positions: Positions) -> tuple[Positions, Positions]:
        """Finds positions of the array that lie in the box.

        Returns:
            (their indices in `positions`, their positions in the box, row by row).
        """
        rest = positions - self.offset
        inside = rest >= 0
        at = np.zeros_like(rest)
        steps = contiguous(self.shape).strides
        # Divides by one stride after the other, the largest first; no element of a box has two positions.
        for dim in sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim]):
            if self.shape[dim] > 1:
                index = rest // self.strides[dim]
                inside &= index < self.shape[dim]
                at += index * steps[dim]
                rest = rest - index * self.strides[dim]
        inside &= rest == 0
        chosen = np.flatnonzero(inside)
        return chosen, at[chosen]

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
        return _moved(positions, self.weight, self.stored)

    def to_weight(self, positions: Positions) -> tuple[Positions, Positions]:
        """Finds the positions of the checkpoint's tensor that belong to the view.

        Returns:
            (their indices in `positions`, in the order of the weight; their positions in the weight).
        """
        if self.is_same:
            return np.arange(positions.size), positions
        return _moved(positions, self.stored, self.weight)


def _moved(positions: Positions, source: Box, target: Box) -> tuple[Positions, Positions]:
    chosen, at = source.inside(positions)
    moved = target.positions(at)
    order = np.argsort(moved, kind="stable")
    return chosen[order], moved[order]


def whole_view(name: str, shape: Shape) -> View:
    """The view of a weight that is stored as it is."""
    box = contiguous(shape)
    return View(name, shape, box, box, box.numel)
