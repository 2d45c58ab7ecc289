"""A backend of live tensors built from a few array operations that NumPy and torch both have.

A backend that fuses these operations overrides `apply`, `replace` and `restore`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import out_of_range
from shiradelta.hotswap.layers import Array, Held, Layer, LayerPatch, Patch, Stack, patches_on, stacks_of
from shiradelta.hotswap.protocol import LiveBackend, Overwritten, Part
from shiradelta.hotswap.transcode import stored_positions
from shiradelta.models.live import Target
from shiradelta.models.memory import flat_bits, is_array
from shiradelta.util.arrays import overlay_values


class Elementwise(LiveBackend, ABC):
    """A `LiveBackend` that works tensor by tensor: it decodes, reads, adds and writes."""

    name: str
    reads_on_base = False
    #: The array library: numpy or torch.
    xp: Any

    @abstractmethod
    def positions(self, patch: Patch) -> Array:
        """Flat positions of the patch's nonzeros, int64 [nnz]."""

    @abstractmethod
    def payload(self, patch: Patch) -> Array:
        """[nnz]: float32 values of an ADD, elements' bits of a SET, of integers of their size for a ULP."""

    @abstractmethod
    def read(self, target: Target, positions: Array) -> Array:
        """Elements' bits at flat row-major positions."""

    @abstractmethod
    def write(self, target: Target, positions: Array, bits: Array) -> None:
        """Writes elements' bits at flat row-major positions."""

    @abstractmethod
    def merge(self, parts: Sequence[Array]) -> tuple[Array, list[Array]]:
        """(the sorted union of increasing positions, the index in it of each part's positions)."""

    @abstractmethod
    def zeros(self, like: Array, dtype: str) -> Array:
        """Zeros of the shape of `like`, on its device."""

    @abstractmethod
    def scaled(self, values: Array, strength: float) -> Array:
        """fl32(alpha v)."""

    @abstractmethod
    def plus(self, one: Array, other: Array) -> Array:
        """fl32(a + b)."""

    @abstractmethod
    def add(self, bits: Array, dtype: str, contribution: Array) -> Array:
        """Bits of round(fl32(W + s)); NaN stays as it is."""

    @abstractmethod
    def shift(self, bits: Array, dtype: str, shifts: Array) -> Array:
        """Bits of elements moved along their order.  Raises DeltaError where one leaves its dtype's range."""

    @abstractmethod
    def fingerprint(self, positions: Array, bits: Array) -> int:
        """The fingerprint of elements at their positions (FORMAT.md, 6.3)."""

    @abstractmethod
    def bits_type(self, dtype: str) -> Any:
        """The array library's type for the bits of elements."""

    def saved(self, item: LayerPatch) -> Array:
        """The patch's part of the layer's room, as elements' bits [nnz]."""
        layer, number = item
        return layer.room[layer.held.span(number)].view(self.bits_type(item.patch.dtype))

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> Callable[[], list[int]]:
        """Fingerprints of the base at each patch's positions, one patch after the other."""
        stacks = patches_on(below)
        return lambda: [self._fingerprint_of(patch, stacks.get(patch.target, [])) for patch in held.patches]

    def part_fingerprints(self, parts: Sequence[Part]) -> list[list[tuple[int, int]]]:
        """Fingerprints of (the base, what is there now), one part after the other."""
        return [self._fingerprints_of_part(part) for part in parts]

    def _fingerprints_of_part(self, part: Part) -> list[tuple[int, int]]:
        patch, below, shown = part
        positions, found = self.positions(patch), []
        present = self.read(patch.target, positions)
        base = self._beneath(present, positions, below)
        for views in shown:
            chosen, stored = stored_positions(positions, views)
            now = self.fingerprint(stored, present[chosen])
            found.append((self.fingerprint(stored, base[chosen]) if below else now, now))
        return found

    def _beneath(self, bits: Array, positions: Array, below: Stack) -> Array:
        """The base's bits at positions, given those that are there now."""
        for item in below:
            bits = overlay_values(self.xp, bits, positions, self.positions(item.patch), self.saved(item))
        return bits

    def lay_over(self, bits: Array, below: Stack) -> Array:
        """Writes the base's bits into a copy of all that are there now, and returns it."""
        for item in below:
            bits[self.positions(item.patch)] = self.saved(item)
        return bits

    def _fingerprint_of(self, patch: Patch, below: Stack) -> int:
        positions = self.positions(patch)
        return self.fingerprint(positions, self._beneath(self.read(patch.target, positions), positions, below))

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """Restores the base, then applies the new layers."""
        self.restore(before)
        for stack in stacks_of(after).values():
            self.apply(stack)

    def apply(self, stack: Stack) -> None:
        """Applies patches to one tensor, which holds its base's elements.

        Nothing but the write itself can fail once the patches are marked as `filled`.
        """
        target = stack[0].patch.target
        union, indices = self._union([item.patch for item in stack])
        old = self.read(target, union)
        for item, at in zip(stack, indices, strict=True):
            self.saved(item)[:] = old[at]
        new = self._combined(old, stack, indices)
        for layer, number in stack:
            layer.filled[number] = True
        self.write(target, union, new)

    def restore(self, layers: Sequence[Layer]) -> None:
        """Writes saved elements back.  Layers that overlap saved the same elements."""
        for layer in layers:
            for number in np.flatnonzero(layer.filled).tolist():
                self.restore_one(LayerPatch(layer, number))

    def restore_one(self, item: LayerPatch) -> None:
        """Writes the saved elements of one patch back; the patch is `filled`."""
        self.write(item.patch.target, self.positions(item.patch), self.saved(item))

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """Whether two patches of a target have a position in common."""
        union, _ = self._union([one, other])
        return len(union) < one.record.nnz + other.record.nnz

    def changed(self, layers: Sequence[Layer]) -> int:
        """Number of elements at the layers' positions whose bits differ from the base's."""
        return sum(int((now != base).sum()) for _, _, _, base, now in self._overwritten(layers))

    def overwritten(self, layers: Sequence[Layer]) -> Iterator[Overwritten]:
        """Takes the elements to the host, tensor by tensor."""
        for target, dtype, positions, base, now in self._overwritten(layers):
            yield Overwritten(target, dtype, _on_host(positions).view(np.int64), _on_host(base), _on_host(now))

    def _overwritten(self, layers: Sequence[Layer]) -> Iterator[tuple[Target, str, Array, Array, Array]]:
        """(tensor, dtype, positions, the base's bits, present bits), for each tensor that the layers change."""
        for target, stack in patches_on(layers).items():
            union, indices = self._union([item.patch for item in stack])
            now = self.read(target, union)
            base = now + 0  # a copy
            for item, at in zip(stack, indices, strict=True):
                base[at] = self.saved(item)
            yield target, stack[0].patch.dtype, union, base, now

    def stream(self, given: Any) -> Any:
        """None: on a CPU, work is done when a call returns."""
        return None

    def ordered(self, stream: Any, reads: bool = False) -> AbstractContextManager[None]:
        """An empty context."""
        return nullcontext()

    def _union(self, patches: Sequence[Patch]) -> tuple[Array, list[Any]]:
        """(sorted union of the patches' positions, the index in it of each patch's positions)."""
        parts = [self.positions(patch) for patch in patches]
        return self.merge(parts) if len(parts) > 1 else (parts[0], [slice(None)])

    def _combined(self, old: Array, stack: Stack, indices: Sequence[Any]) -> Array:
        """The new elements at the union of several deltas' positions; `old` are the base's."""
        bits, total = old, None
        for item, at in zip(stack, indices, strict=True):
            payload = self.payload(item.patch)
            if not item.patch.record.adds:
                bits = bits + 0  # a copy
                bits[at] = self._shifted(bits[at], item, payload) if item.patch.record.operation.shifts else payload
                continue
            contribution = self.scaled(payload, item.layer.strength)
            if total is None:
                total, added = self.zeros(old, "float32"), self.zeros(old, "bool")
            # The sum starts from the first contribution, not from +0, which would lose the sign of -0.
            total[at] = self.xp.where(added[at], self.plus(total[at], contribution), contribution)
            added[at] = True
        if total is None:
            return bits
        return self.xp.where(added, self.add(bits, stack[-1].patch.dtype, total), bits)

    def _shifted(self, bits: Array, item: LayerPatch, shifts: Array) -> Array:
        try:
            return self.shift(bits, item.patch.dtype, shifts)
        except DeltaError:
            raise out_of_range(f"tensor {item.patch.record.name!r}") from None


def _on_host(numbers: Array) -> Array:
    """Integers of NumPy or torch as unsigned ones in NumPy."""
    return numbers.view(f"u{numbers.itemsize}") if is_array(numbers) else flat_bits(numbers)
