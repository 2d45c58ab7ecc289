"""The reference backend of live tensors: NumPy, on arrays and on torch's CPU tensors, whose memory it shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shiradelta.format import arithmetic, registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.hotswap.elementwise import Elementwise
from shiradelta.hotswap.fits import Fits
from shiradelta.hotswap.layers import Held, Layer, Patch, Stack, patches_on
from shiradelta.hotswap.protocol import Part
from shiradelta.io.reader import StoredTensor
from shiradelta.io.restored import Elements, InMemory
from shiradelta.models.live import Target
from shiradelta.models.memory import flat_bits, is_array
from shiradelta.util.arrays import merge_sorted
from shiradelta.util.threads import map_in_threads


class NumpyBackend(Elementwise):
    """The reference backend: works tensor by tensor, as the format defines it."""

    name = "numpy"
    xp = np

    def buffer(self, size: int) -> Bytes:
        return np.empty(size, np.uint8)

    def all_elements(self, target: Target, below: Stack) -> Elements:
        bits = host_bits(target)
        return InMemory(self.lay_over(bits.copy(), below) if below else bits)

    def hold(self, files: Sequence[Fits]) -> Held:
        """Keeps the files' bytes, compressed."""
        for one in files:
            one.read()
        tensors = [tensor for one in files for tensor, _, _ in one.fits()]
        for tensor in tensors:
            tensor.check()
        return held_as_stored(files, tensors)

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> Callable[[], list[int]]:
        """Fingerprints of the base at each patch's positions, on several threads."""
        stacks = patches_on(below)

        def one(patch: Patch) -> int:
            return self._fingerprint_of(patch, stacks.get(patch.target, []))

        return lambda: map_in_threads(one, held.patches)

    def part_fingerprints(self, parts: Sequence[Part]) -> list[list[tuple[int, int]]]:
        """Fingerprints of (the base, what is there now), on several threads."""
        return map_in_threads(self._fingerprints_of_part, parts)

    def room(self, size: int) -> Array:
        return np.empty(size, np.uint8)

    def bits_type(self, dtype: str) -> Any:
        return registry.DTYPE_OF_NAME[dtype].bits

    def positions(self, patch: Patch) -> Positions:
        tensor: StoredTensor = patch.data
        return tensor.positions()

    def payload(self, patch: Patch) -> Array:
        tensor: StoredTensor = patch.data
        return tensor.payload()

    def read(self, target: Target, positions: Positions) -> Array:
        array, index = _indexed(target, positions)
        taken: Array = array[index]
        return taken

    def write(self, target: Target, positions: Positions, bits: Array) -> None:
        array, index = _indexed(target, positions)
        array[index] = bits

    def merge(self, parts: Sequence[Array]) -> tuple[Array, list[Array]]:
        union, indices, _ = merge_sorted(parts)
        return union, indices

    def zeros(self, like: Array, dtype: str) -> Array:
        return np.zeros(like.shape, dtype)

    def scaled(self, values: Array, strength: float) -> Array:
        return arithmetic.scaled(values, strength)

    def plus(self, one: Array, other: Array) -> Array:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            total: Array = one + other
        return total

    def add(self, bits: Array, dtype: str, contribution: Array) -> Array:
        return arithmetic.add(bits, dtype, contribution)

    def shift(self, bits: Array, dtype: str, shifts: Array) -> Array:
        return arithmetic.shift(bits, dtype, shifts)

    def fingerprint(self, positions: Positions, bits: Array) -> int:
        return arithmetic.fingerprint(positions, bits)


def held_as_stored(files: Sequence[Fits], datas: Sequence[Any]) -> Held:
    """Wraps patches whose sections stay as stored in the files, with what they are decoded from."""
    fits = [one.columns for one in files]
    stored = sum(int(one.rows["index_stored"].sum() + one.rows["values_stored"].sum()) for one in fits)
    return Held(fits, datas, stored)


def elements(target: Target) -> Array:
    """The tensor's elements as unsigned integers that share its memory, in its own shape."""
    tensor = target.tensor
    if is_array(tensor):
        array: Array = tensor.view(f"u{tensor.itemsize}")
    else:
        import torch

        array = tensor.view(getattr(torch, f"uint{8 * tensor.element_size()}")).numpy()
    return array


def _indexed(target: Target, positions: Positions) -> tuple[Array, Positions | tuple[Positions, ...]]:
    """The elements, and an index of the positions into them."""
    array = elements(target)
    if array.flags.c_contiguous:
        return array.reshape(-1), positions
    return array, np.unravel_index(positions, array.shape)


def host_bits(target: Target) -> Array:
    """All elements' bits, flat, in the host's memory; a copy only where they are elsewhere, or not row by row."""
    if not is_array(target.tensor):
        return flat_bits(target.tensor)
    array: Array = np.ascontiguousarray(target.tensor)
    return array.reshape(-1).view(f"<u{array.itemsize}")
