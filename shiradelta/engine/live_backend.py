"""The seam between a hot-swap session and the memory that the weights lie in.

A session says what is to be on which tensor; a backend holds the compressed deltas beside the tensors and does the
work on their elements.  `Elementwise` is the whole of it in terms of a few array operations, which NumPy defines and
torch has too; a backend that fuses them overrides `apply` and `restore`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from shiradelta.codecs.base import Bytes
from shiradelta.engine.live import Target
from shiradelta.header import Record
from shiradelta.reader import StoredTensor

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


@dataclass(eq=False)
class Layer:
    """A patch that is on its tensor, or is about to be.

    Attributes:
        strength: alpha.
        saved: the base's elements' bits, [nnz].
        filled: whether `saved` holds them yet.
    """

    patch: Patch
    strength: float
    saved: Array
    filled: bool = False


#: The layers of one tensor, in the order in which they count: SETs, then ADDs by digest.
Stack = Sequence[Layer]


class LiveBackend(Protocol):
    """Work on the elements of tensors in one kind of memory.  All give the same bits."""

    name: str

    def buffer(self, size: int) -> Bytes:
        """Host memory to read a file into."""

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> list[Patch]:
        """Checks the tensors' deltas wholly and copies them, compressed, to where the targets are.

        Args:
            source: the file, in memory that `buffer` gave, which nobody changes.
            tensors: (delta, target, dtype of the target's elements).

        Raises:
            FormatError: a section is damaged.
        """

    def room(self, patches: Sequence[Patch]) -> list[Array]:
        """Memory for the elements that each patch overwrites."""

    def fingerprints(self, patches: Sequence[Patch], below: Mapping[Target, Stack]) -> list[int]:
        """Of the base at each patch's positions; `below` is what is on the targets now."""

    def apply(self, stacks: Sequence[Stack]) -> None:
        """Saves the base's elements and writes the results (FORMAT.md, 6.2).  The targets hold their base.

        If it raises, every tensor that it may have written to has its layers `filled`.
        """

    def restore(self, layers: Sequence[Layer]) -> None:
        """Puts saved elements back."""

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """Whether two patches of a target have a position in common."""

    def changed(self, stacks: Sequence[Stack]) -> int:
        """Elements whose bits are not those of the base now."""

    def nbytes(self, patches: Sequence[Patch]) -> int:
        """Memory that the patches take."""

    def ordered(self, stream: Any) -> AbstractContextManager[None]:
        """A context whose work follows all earlier work of this backend, on a device's stream if given."""


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

    def fingerprints(self, patches: Sequence[Patch], below: Mapping[Target, Stack]) -> list[int]:
        """One by one."""
        found = []
        for patch in patches:
            positions = self.positions(patch)
            bits = self.read(patch.target, positions)
            for layer in below.get(patch.target, ()):
                bits = self._overlaid(bits, positions, self.positions(layer.patch), layer.saved)
            found.append(self.fingerprint(positions, bits))
        return found

    def apply(self, stacks: Sequence[Stack]) -> None:
        """Tensor by tensor; nothing can fail between `filled` and the end of the writing but the writing."""
        for stack in stacks:
            union, places = self._union(stack)
            old = self.read(stack[0].patch.target, union)
            for layer, place in zip(stack, places, strict=True):
                layer.saved[:] = old[place]
            new = self._combined(old, stack, places)
            for layer in stack:
                layer.filled = True
            self.write(stack[0].patch.target, union, new)

    def restore(self, layers: Sequence[Layer]) -> None:
        """One by one: where layers overlap they have saved the same."""
        for layer in layers:
            self.write(layer.patch.target, self.positions(layer.patch), layer.saved)

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """By their union."""
        union, _ = self._union([Layer(one, 1, None), Layer(other, 1, None)])
        return len(union) < one.record.nnz + other.record.nnz

    def changed(self, stacks: Sequence[Stack]) -> int:
        """Counts in the union of the layers."""
        count = 0
        for stack in stacks:
            union, places = self._union(stack)
            now = self.read(stack[0].patch.target, union)
            base = now + 0  # a copy
            for layer, place in zip(stack, places, strict=True):
                base[place] = layer.saved
            count += int((now != base).sum())
        return count

    def ordered(self, stream: Any) -> AbstractContextManager[None]:
        """Work on a CPU is done when it returns."""
        return nullcontext()

    def _union(self, stack: Stack) -> tuple[Array, list[Any]]:
        """(positions of all layers, increasing; where in them each layer's are)."""
        parts = [self.positions(layer.patch) for layer in stack]
        return self.merge(parts) if len(parts) > 1 else (parts[0], [slice(None)])

    def _combined(self, old: Array, stack: Stack, places: Sequence[Any]) -> Array:
        """What several deltas make of the base's elements at the union of their positions."""
        bits, total = old, None
        for layer, place in zip(stack, places, strict=True):
            payload = self.payload(layer.patch)
            if not layer.patch.record.adds:
                bits = bits + 0  # a copy
                bits[place] = payload
                continue
            contribution = self.scaled(payload, layer.strength)
            if total is None:
                total, added = self.zeros(old, "float32"), self.zeros(old, "bool")
            # Starting from the first contribution and not from +0, which would lose the sign of -0.
            total[place] = self.xp.where(added[place], self.plus(total[place], contribution), contribution)
            added[place] = True
        if total is None:
            return bits
        return self.xp.where(added, self.add(bits, stack[-1].patch.dtype, total), bits)

    def _overlaid(self, bits: Array, positions: Array, at: Array, saved: Array) -> Array:
        """`bits` with `saved` where its positions `at` are among `positions`."""
        if not len(at):
            return bits
        slot = self.xp.searchsorted(at, positions).clip(max=len(at) - 1)
        return self.xp.where(at[slot] == positions, saved[slot], bits)
