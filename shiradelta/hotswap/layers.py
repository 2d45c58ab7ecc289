"""Compressed patches of live tensors, and the layers in which they are active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from shiradelta.format.operations import OPERATIONS, Operation
from shiradelta.format.record import Record
from shiradelta.hotswap.fits import FitColumns, Targets
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

    Args:
        fits: the tensors of a file and of the model, one patch each, in the order of the file's names; of several
            files, one after the other.
        datas: what the backend decodes each patch from.
        nbytes: memory that the patches take.

    Attributes:
        fits: as it was given.
        datas: as it was given.
        patches: the patches, each made when it is asked for.
        targets: the tensors that the patches change.
        every: the tensor of each patch, also of those that change nothing.
        nbytes: as it was given.
        data: the backend's data about all patches together.
        room: bytes needed to save the elements that the patches change.
        starts: where each patch's elements begin there, int64 [patches].
        nonzeros: of each patch, int64 [patches].
        empty: for each patch, whether it changes nothing.
        counted: tensors of the model whose versions autograd counts.
    """

    def __init__(self, fits: Sequence[FitColumns], datas: Sequence[Any], nbytes: int) -> None:
        self.fits, self.nbytes = fits, nbytes
        self.datas: Any = datas
        self.data: Any = None
        self.patches = _Patches(fits, datas)
        self.nonzeros = together([one.nonzeros for one in fits])
        self._sizes = self.nonzeros * together([one.sizes for one in fits])
        room = -(-self._sizes // _ALIGNMENT) * _ALIGNMENT
        self.starts, self.room = np.cumsum(room) - room, int(room.sum())
        self.empty = self._sizes == 0
        every = changing = self.every
        if self.empty.any():
            changing = Targets(compress(every, ~self.empty))
        self.targets, self.counted = changing.different, every.counted
        self._there, self._tensors = every.there, every.moving
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    @cached_property
    def every(self) -> Targets:
        return self.fits[0].targets if len(self.fits) == 1 else Targets(chain(*[one.targets for one in self.fits]))

    @property
    def operations(self) -> set[Operation]:
        """What the patches do."""
        ids = {own for one in self.fits for own in one.rows["operation"].tobytes()}  # a byte each
        return {OPERATIONS.by_id[own] for own in ids}

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


class _Patches(Sequence[Patch]):
    """The patches of a delta: most work is on all of them, by columns."""

    def __init__(self, fits: Sequence[FitColumns], datas: Sequence[Any]) -> None:
        self._fits, self._datas = fits, datas
        self._made: list[Patch | None] = [None] * len(datas)

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, number: int) -> Patch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Patch]: ...
    def __getitem__(self, number: int | slice) -> Patch | list[Patch]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        found = self._made[number]
        if found is None:
            at = number
            for one in self._fits:
                if at < len(one):
                    break
                at -= len(one)
            found = Patch(one.targets[at], one.record(at), one.dtypes[at], self._datas[number])
            self._made[number] = found
        return found


def together(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Columns of several files, one after the other."""
    return columns[0] if len(columns) == 1 else np.concatenate([*columns, np.zeros(0, np.int64)])


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
