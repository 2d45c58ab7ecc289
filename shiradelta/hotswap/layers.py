"""Compressed patches of live tensors, and the layers in which they are active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.record import Record
from shiradelta.models.live import Target

#: Saved elements of each patch begin at a multiple of so many bytes.
_ALIGNMENT = 8
#: An array of the backend's kind.
Array = Any


@dataclass(eq=False, slots=True)  # frozen, it would take twice as long to make
class Patch:
    """One delta's change of one tensor, compressed, in the memory where the tensor is.

    Attributes:
        target: the tensor.
        record: the delta's row in the file's table.
        dtype: the dtype of the tensor's elements; the file may leave it open.
        data: what the backend decodes the delta from.
    """

    target: Target
    record: Record
    dtype: str
    data: Any


class Held:
    """One loaded delta, as a backend holds it.

    Attributes:
        patches: the patches, one per tensor, in the order of the file's names.
        targets: the tensors that the patches change.
        nbytes: memory that the patches take.
        data: the backend's data about all patches together.
        room: bytes needed to save the elements that the patches change.
        starts: where each patch's elements begin there, int64 [patches].
        nonzeros: of each patch, int64 [patches].
        empty: for each patch, whether it changes nothing.
        counted: tensors of the model whose versions autograd counts.
    """

    def __init__(self, patches: Sequence[Patch], nbytes: int, data: Any = None) -> None:
        self.patches, self.nbytes, self.data = tuple(patches), nbytes, data
        self.nonzeros = np.array([patch.record.nnz for patch in patches], np.int64)
        sizes = {dtype: registry.DTYPE_OF_NAME[dtype].size for dtype in {patch.dtype for patch in patches}}
        self._sizes = self.nonzeros * np.array([sizes[patch.dtype] for patch in patches], np.int64)
        room = -(-self._sizes // _ALIGNMENT) * _ALIGNMENT
        self.starts, self.room = np.cumsum(room) - room, int(room.sum())
        self.empty = self._sizes == 0
        self.targets = frozenset([patch.target for patch in patches if patch.record.nnz])
        self._there = [patch.target for patch in patches if patch.target.address]
        self.counted = [target.holder for target in self._there if not target.holder.is_inference()]
        self._tensors = [target.tensor for target in self._there]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def span(self, number: int) -> slice:
        """The bytes of a layer's room that belong to a patch."""
        start = int(self.starts[number])
        return slice(start, start + int(self._sizes[number]))

    def has_same_tensors(self, other: Held) -> bool:
        """Whether both change the same tensors of the model, as deltas of one kind mostly do."""
        return self._there == other._there

    def check_memory(self) -> None:
        """Checks that the tensors' memory is still theirs, so that it may be written.

        The memory stays valid when the model takes other tensors; only resizing a storage releases it.

        Raises:
            TargetError: a tensor's memory was released.
        """
        now = [tensor.data_ptr() for tensor in self._tensors]
        if now != self._addresses:
            raise next(t.moved_error() for t, a, b in zip(self._there, now, self._addresses, strict=True) if a != b)

    def check_model(self) -> None:
        """Checks that the model still has all tensors.

        Raises:
            TargetError: a tensor was moved or replaced since HotSwap read the model.
        """
        for target in self._there:
            if not target.is_there():
                raise target.moved_error()


class Layer:
    """A delta that is on its tensors, or is about to be.

    Attributes:
        held: the delta's patches.
        strength: alpha.
        room: bytes for the base's elements.
        filled: for each patch, whether its elements have been saved in the room.
    """

    def __init__(self, held: Held, strength: float, room: Array, filled: NDArray[np.bool_] | None = None) -> None:
        self.held, self.strength, self.room = held, strength, room
        self.filled = held.empty.copy() if filled is None else filled


class LayerPatch(NamedTuple):
    """One patch of a layer."""

    layer: Layer
    number: int

    @property
    def patch(self) -> Patch:
        """The patch itself."""
        return self.layer.held.patches[self.number]


#: The patches on one tensor, in the order in which they take effect: SETs, then ADDs by digest.
Stack = list[LayerPatch]


def patches_on(layers: Sequence[Layer]) -> dict[Target, Stack]:
    """The patches on each tensor, in the order of the layers."""
    found: dict[Target, Stack] = {}
    for layer in layers:
        for number, patch in enumerate(layer.held.patches):
            if patch.record.nnz:
                found.setdefault(patch.target, []).append(LayerPatch(layer, number))
    return found


def stacks_of(layers: Sequence[Layer]) -> dict[Target, Stack]:
    """The patches on each tensor in the order in which they take effect, of layers in the order of their digests."""
    stacks = patches_on(layers)
    for stack in stacks.values():
        if len(stack) > 1:
            stack.sort(key=lambda item: item.patch.record.adds)  # stable
    return stacks


def different_tensors(states: Iterable[Sequence[Layer]]) -> list[Held]:
    """One delta of each distinct set of target tensors."""
    found: list[Held] = []
    for held in (layer.held for layers in states for layer in layers):
        if not any(held.has_same_tensors(other) for other in found):
            found.append(held)
    return found


def targets_below(states: Iterable[Sequence[Layer]]) -> frozenset[Target]:
    """All tensors that layers change."""
    return frozenset().union(*(held.targets for held in different_tensors(states)))


def only_strengths_differ(before: Sequence[Layer], after: Sequence[Layer]) -> bool:
    """Whether both have the same deltas in the same rooms."""
    return len(before) == len(after) and all(a.room is b.room for a, b in zip(before, after, strict=True))


def increment_versions(helds: Iterable[Held]) -> None:
    """Tells autograd that the adapters' tensors have changed."""
    counted = [held.counted for held in helds if held.counted]
    if counted:
        from torch.autograd.graph import increment_version

        for tensors in counted:
            increment_version(tensors)
