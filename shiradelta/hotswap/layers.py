"""The seam between a hot-swap session and the memory that the weights lie in.

A session says what is to be on which tensor; a backend holds the compressed deltas beside the tensors and does the
work on their elements.  `Elementwise` is the whole of it in terms of a few array operations, which NumPy defines and
torch has too; a backend that fuses them overrides `replace` and `restore`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.container import Record
from shiradelta.io.reader import StoredTensor
from shiradelta.models.live import Target

#: An array of the backend's kind.
Array = Any


@dataclass(frozen=True, eq=False)
class Patch:
    """What one adapter does to one tensor, compressed, in the memory where the tensor is.

    Attributes:
        data: what the backend decodes it from.
        dtype: that of the elements, which the file may leave open.
    """

    target: Target
    record: Record
    dtype: str
    data: Any


class Held:
    """What a backend holds of one adapter.

    Attributes:
        patches: one a tensor that it is for, in the order of the file's names.
        targets: the tensors that it changes.
        nbytes: memory that they take.
        data: what the backend needs to know of all of them together.
        room: bytes that it takes to save the elements that they change.
    """

    def __init__(self, patches: Sequence[Patch], nbytes: int, data: Any = None) -> None:
        self.patches, self.nbytes, self.data = tuple(patches), nbytes, data
        sizes = [patch.record.nnz * registry.DTYPE_OF_NAME[patch.dtype].size for patch in patches]
        starts = list(accumulate((registry.align(size, 8) for size in sizes), initial=0))
        self._spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.room = starts[-1]
        #: For each patch, whether it changes nothing.
        self.empty = np.array([size == 0 for size in sizes], np.bool_)
        self.targets = frozenset(patch.target for patch in patches if patch.record.nnz)
        self._there = [patch.target for patch in patches if patch.target.address]
        #: Tensors of the model whose versions autograd counts.
        self.counted = [target.holder for target in self._there if not target.holder.is_inference()]
        self._tensors = [target.tensor for target in self._there]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def span(self, number: int) -> slice:
        """Where the room of a patch lies in that of all, in bytes."""
        return self._spans[number]

    def is_where(self, other: Held) -> bool:
        """Whether it is for the same tensors of the model: adapters of a kind mostly are."""
        return self._there == other._there

    def check_memory(self) -> None:
        """Raises TargetError if memory of the tensors may have gone to others: nothing may be written there.

        It stays ours when the model takes other tensors; only resizing a storage gives it back.
        """
        now = [tensor.data_ptr() for tensor in self._tensors]
        if now != self._addresses:
            raise next(t.moved_error() for t, a, b in zip(self._there, now, self._addresses, strict=True) if a != b)

    def check_model(self) -> None:
        """Raises TargetError if the model has moved or replaced one of the tensors since it was looked at."""
        for target in self._there:
            if not target.is_there():
                raise target.moved_error()


class Layer:
    """An adapter that is on its tensors, or is about to be.

    Attributes:
        strength: alpha.
        room: bytes for the base's elements.
        filled: for each patch, whether its elements are in there yet.
    """

    def __init__(self, held: Held, strength: float, room: Array, filled: NDArray[np.bool_] | None = None) -> None:
        self.held, self.strength, self.room = held, strength, room
        self.filled = held.empty.copy() if filled is None else filled


class Place(NamedTuple):
    """A layer's patch on one tensor."""

    layer: Layer
    number: int

    @property
    def patch(self) -> Patch:
        """Itself."""
        return self.layer.held.patches[self.number]


#: What is on one tensor, in the order in which it counts: SETs, then ADDs by digest.
Stack = list[Place]


def stacks_of(layers: Sequence[Layer]) -> dict[Target, Stack]:
    """What layers, which are in the order of their digests, put on each tensor."""
    stacks: dict[Target, Stack] = {}
    for layer in layers:
        for number, patch in enumerate(layer.held.patches):
            if patch.record.nnz:
                stacks.setdefault(patch.target, []).append(Place(layer, number))
    for stack in stacks.values():
        stack.sort(key=lambda place: place.patch.record.adds)  # stable
    return stacks


def only_strengths_differ(before: Sequence[Layer], after: Sequence[Layer]) -> bool:
    """Whether layers are the same adapters in the same rooms."""
    return len(before) == len(after) and all(a.room is b.room for a, b in zip(before, after, strict=True))


class LiveBackend(Protocol):
    """Work on the elements of tensors in one kind of memory.  All give the same bits.

    Layers are in the order of their adapters' digests.
    """

    name: str

    def buffer(self, size: int) -> Bytes:
        """Host memory to read a file into."""

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> Held:
        """Checks the tensors' deltas wholly and copies them, compressed, to where the targets are.

        Args:
            source: the file, in memory that `buffer` gave, which nobody changes.
            tensors: (delta, target, dtype of the target's elements).

        Raises:
            FormatError: a section is damaged.
        """

    def room(self, size: int) -> Array:
        """Bytes for elements to be saved in."""

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> list[int]:
        """Of the base at each patch's positions; `below` is what is on the targets now."""

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """From the base with some layers to the base with others: saves its elements, writes results (FORMAT.md, 6.2).

        Layers that share their room are one adapter with another strength.  If it raises, patches of `after` that may
        have been written are `filled`.
        """

    def restore(self, layers: Sequence[Layer]) -> None:
        """Puts saved elements back, of patches that are `filled`."""

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """Whether two patches of a target have a position in common."""

    def changed(self, layers: Sequence[Layer]) -> int:
        """Elements whose bits are not those of the base now."""

    def ordered(self, stream: Any, reads: bool = False) -> AbstractContextManager[None]:
        """A context whose work follows all earlier work of this backend, on a device's stream if given.

        What follows it need not follow work that only `reads`, and that is waited for within.
        """


class Elementwise(ABC):
    """A `LiveBackend`, tensor by tensor, from decoding, reading, adding and writing."""

    name: str
    #: The array library: numpy or torch.
    xp: Any

    @abstractmethod
    def positions(self, patch: Patch) -> Array:
        """int64 [nnz]."""

    @abstractmethod
    def payload(self, patch: Patch) -> Array:
        """[nnz]: float32 values of ADD, elements' bits of SET."""

    @abstractmethod
    def read(self, target: Target, positions: Array) -> Array:
        """Elements' bits at flat row-major positions."""

    @abstractmethod
    def write(self, target: Target, positions: Array, bits: Array) -> None:
        """The inverse of `read`."""

    @abstractmethod
    def merge(self, parts: Sequence[Array]) -> tuple[Array, list[Array]]:
        """(the union of increasing positions, increasing; where in it each part's are)."""

    @abstractmethod
    def zeros(self, like: Array, dtype: str) -> Array:
        """As many zeros as `like` has, where it is."""

    @abstractmethod
    def scaled(self, values: Array, strength: float) -> Array:
        """fl32(alpha v)."""

    @abstractmethod
    def plus(self, one: Array, other: Array) -> Array:
        """fl32(a + b)."""

    @abstractmethod
    def add(self, bits: Array, dtype: str, contribution: Array) -> Array:
        """Bits of round(fl32(W + s)); NaN is left as it is."""

    @abstractmethod
    def fingerprint(self, positions: Array, bits: Array) -> int:
        """FORMAT.md, 6.3."""

    @abstractmethod
    def bits_type(self, dtype: str) -> Any:
        """The array library's type of elements' bits."""

    def saved(self, place: Place) -> Array:
        """Elements' bits, [nnz], in the layer's room."""
        layer, number = place
        return layer.room[layer.held.span(number)].view(self.bits_type(place.patch.dtype))

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> list[int]:
        """One by one."""
        stacks = stacks_of(below)
        return [self._fingerprint_of(patch, stacks.get(patch.target, [])) for patch in held.patches]

    def _fingerprint_of(self, patch: Patch, below: Stack) -> int:
        positions = self.positions(patch)
        bits = self.read(patch.target, positions)
        for place in below:
            bits = self._overlaid(bits, positions, self.positions(place.patch), self.saved(place))
        return self.fingerprint(positions, bits)

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """Back to the base, and on from there."""
        self.restore(before)
        for stack in stacks_of(after).values():
            self.apply(stack)

    def apply(self, stack: Stack) -> None:
        """Onto one tensor, which has its base's elements.

        Nothing can fail between `filled` and the end of the writing but the writing.
        """
        target = stack[0].patch.target
        union, places = self._union([place.patch for place in stack])
        old = self.read(target, union)
        for place, at in zip(stack, places, strict=True):
            self.saved(place)[:] = old[at]
        new = self._combined(old, stack, places)
        for layer, number in stack:
            layer.filled[number] = True
        self.write(target, union, new)

    def restore(self, layers: Sequence[Layer]) -> None:
        """One by one: where layers overlap they have saved the same."""
        for layer in layers:
            for number in np.flatnonzero(layer.filled).tolist():
                self.restore_one(Place(layer, number))

    def restore_one(self, place: Place) -> None:
        """Of a patch that is filled."""
        self.write(place.patch.target, self.positions(place.patch), self.saved(place))

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """By their union."""
        union, _ = self._union([one, other])
        return len(union) < one.record.nnz + other.record.nnz

    def changed(self, layers: Sequence[Layer]) -> int:
        """Counts in the union of the layers."""
        count = 0
        for stack in stacks_of(layers).values():
            union, places = self._union([place.patch for place in stack])
            now = self.read(stack[0].patch.target, union)
            base = now + 0  # a copy
            for place, at in zip(stack, places, strict=True):
                base[at] = self.saved(place)
            count += int((now != base).sum())
        return count

    def ordered(self, stream: Any, reads: bool = False) -> AbstractContextManager[None]:
        """Work on a CPU is done when it returns."""
        return nullcontext()

    def _union(self, patches: Sequence[Patch]) -> tuple[Array, list[Any]]:
        """(positions of all patches, increasing; where in them each patch's are)."""
        parts = [self.positions(patch) for patch in patches]
        return self.merge(parts) if len(parts) > 1 else (parts[0], [slice(None)])

    def _combined(self, old: Array, stack: Stack, places: Sequence[Any]) -> Array:
        """What several deltas make of the base's elements at the union of their positions."""
        bits, total = old, None
        for place, at in zip(stack, places, strict=True):
            payload = self.payload(place.patch)
            if not place.patch.record.adds:
                bits = bits + 0  # a copy
                bits[at] = payload
                continue
            contribution = self.scaled(payload, place.layer.strength)
            if total is None:
                total, added = self.zeros(old, "float32"), self.zeros(old, "bool")
            # Starting from the first contribution and not from +0, which would lose the sign of -0.
            total[at] = self.xp.where(added[at], self.plus(total[at], contribution), contribution)
            added[at] = True
        if total is None:
            return bits
        return self.xp.where(added, self.add(bits, stack[-1].patch.dtype, total), bits)

    def _overlaid(self, bits: Array, positions: Array, at: Array, saved: Array) -> Array:
        """`bits` with `saved` where its positions `at` are among `positions`."""
        if not len(at):
            return bits
        slot = self.xp.searchsorted(at, positions).clip(max=len(at) - 1)
        return self.xp.where(at[slot] == positions, saved[slot], bits)
