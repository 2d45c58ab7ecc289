"""A source's tensors under the names that PEFT gives them, some of them transposed or in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot
from shiradelta.util.text import brief

#: Arranges an array's elements anew.
Arrange = Callable[[Array], Any]


class Translated(Checkpoint):
    """A checkpoint with other tensors: renamed, rearranged, or parts of its own.

    Args:
        source: the checkpoint.
        slots: the new names -> where the tensors are.
    """

    def __init__(self, source: Checkpoint, slots: Mapping[str, Slot]) -> None:
        self.root, self.shards, self.folders = source.root, source.shards, source.folders
        self._slots = {name: replace(slot, name=name) for name, slot in slots.items()}


def arranged(slot: Slot, arrange: Arrange) -> Slot:
    """A tensor whose elements stand in another order, or of which only some are there; made when it is read.

    Raises:
        SourceError: it has no elements, so its shape may be any.
    """
    if not slot.numel:
        raise SourceError(f"{slot.file}: {brief(repr(slot.name), 120)} has no elements; get it again")

    def read() -> Array:
        found: Array = np.ascontiguousarray(arrange(bits_of(slot).reshape(slot.shape))).reshape(-1)
        return found

    shape = arrange(np.broadcast_to(np.zeros((), np.uint8), slot.shape)).shape
    return replace(slot, shape=shape, read=read)


def transposed(slot: Slot) -> Slot:
    """A matrix with rows for columns."""
    return arranged(slot, np.transpose)


def layers_of(stack: Slot) -> list[Slot]:
    """The tensors of a stack, along its first dimension.

    Raises:
        SourceError: it has no elements, so it may say any number of layers.
    """
    first = arranged(stack, partial(_at, 0))
    return [first, *(arranged(stack, partial(_at, number)) for number in range(1, stack.shape[0]))]


def _at(number: int, stack: Array) -> Array:
    found: Array = stack[number]
    return found


def constant(beside: Slot, value: float) -> Slot:
    """A number that the tensors of a file lack, as a tensor beside one of them."""
    bits = np.array([value], np.float64).view(np.uint64)
    return replace(beside, shape=(), dtype=registry.DTYPE_OF_NAME["float64"], read=lambda: bits)
