"""libshd on live CPU tensors: one pass decodes, adds, rounds and saves, on several threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shiradelta.backends.libshd.decoder import LoadedTensor, NativeDecoder, apply_sum
from shiradelta.backends.libshd.encoder import fingerprint
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.hotswap.fits import Fits
from shiradelta.hotswap.layers import Held, Layer, LayerPatch, Patch, Stack, only_strengths_differ, stacks_of
from shiradelta.hotswap.numpy import NumpyBackend, elements, held_as_stored
from shiradelta.io.reader import StoredTensor
from shiradelta.util.threads import map_in_threads


class _Data(NamedTuple):
    """A tensor's delta, for NumPy and for the library."""

    tensor: StoredTensor
    loaded: LoadedTensor | None  # None for no nonzeros, or if the library does not know the codecs


class NativeBackend(NumpyBackend):
    """libshd patches contiguous tensors; NumPy does SETs below ADDs, strided tensors and codecs unknown to libshd."""

    name = "libshd"

    def hold(self, files: Sequence[Fits]) -> Held:
        """Loading a tensor checks all of it; the files' bytes stay, compressed."""

        def load(tensor: StoredTensor) -> _Data:
            decoder, loaded = tensor.decoder, None
            if not isinstance(decoder, NativeDecoder):
                tensor.check()
            elif tensor.nnz:
                loaded = LoadedTensor(decoder, tensor.record)
            return _Data(tensor, loaded)

        for one in files:
            one.read()
        tensors = [tensor for one in files for tensor, _, _ in one.fits()]
        return held_as_stored(files, map_in_threads(load, tensors))

    def positions(self, patch: Patch) -> Positions:
        held: _Data = patch.data
        return held.tensor.positions()

    def payload(self, patch: Patch) -> Array:
        held: _Data = patch.data
        return held.tensor.payload()

    def fingerprint(self, positions: Positions, bits: Array) -> int:
        return fingerprint(positions, bits)

    def _fingerprint_of(self, patch: Patch, below: Stack) -> int:
        """Takes one pass on a contiguous tensor that has no deltas on it."""
        loaded, weight = self._fused(patch)
        if below or loaded is None or weight is None:
            return super()._fingerprint_of(patch, below)
        return loaded.fingerprint(weight, patch.dtype)

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """If only strengths change, summed elements are recomputed from the saved base without a restore."""
        if not only_strengths_differ(before, after):
            super().replace(before, after)
            return
        for stack in stacks_of(after).values():
            summed = self._summed(stack)
            if summed is not None:
                apply_sum(*summed, from_saved=True)
                continue
            for item in stack:
                self.restore_one(item)
            self.apply(stack)

    def apply(self, stack: Stack) -> None:
        """Takes one pass on a contiguous tensor, for any one delta or for several ADDs."""
        (layer, number), patch = stack[0], stack[0].patch
        loaded, weight = self._fused(patch)
        # The bytes were checked and belong to this process, so the library cannot fail half-way.
        if len(stack) == 1 and loaded is not None and weight is not None:
            loaded.apply(weight, patch.dtype, layer.strength, self.saved(stack[0]))
        elif (summed := self._summed(stack)) is not None:
            apply_sum(*summed)
        else:
            super().apply(stack)
            return
        for layer, number in stack:
            layer.filled[number] = True

    def restore_one(self, item: LayerPatch) -> None:
        loaded, weight = self._fused(item.patch)
        if loaded is None or weight is None:
            super().restore_one(item)
        else:
            loaded.revert(weight, item.patch.dtype, self.saved(item))

    def _fused(self, patch: Patch) -> tuple[LoadedTensor | None, Array | None]:
        """(the library's tensor, the weight's flat bits); None for what the library cannot work on."""
        held: _Data = patch.data
        array = elements(patch.target)
        fits = array.flags.c_contiguous and array.flags.aligned
        return held.loaded, array.reshape(-1) if fits else None

    def _summed(self, stack: Stack) -> tuple[list[tuple[LoadedTensor, float, Array]], Array, str] | None:
        """The arguments of `apply_sum`; None if it cannot do the whole stack."""
        _, weight = self._fused(stack[0].patch)
        if weight is None:
            return None
        addends = []
        for item in stack:
            loaded, _ = self._fused(item.patch)
            if loaded is None or not item.patch.record.adds:
                return None
            addends.append((loaded, item.layer.strength, self.saved(item)))
        return addends, weight, stack[0].patch.dtype
