"""libshd on live CPU tensors: decoded, added, rounded and saved in one pass, on several threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shiradelta.arithmetic import Array, Positions
from shiradelta.codecs.base import Bytes
from shiradelta.engine.live import Target
from shiradelta.engine.live_backend import Layer, Patch, Stack
from shiradelta.engine.numpy_backend import NumpyBackend, elements
from shiradelta.native import LoadedTensor, NativeDecoder
from shiradelta.reader import StoredTensor


class _Held(NamedTuple):
    """A tensor's delta for NumPy's way, and the same for the library's."""

    tensor: StoredTensor
    loaded: LoadedTensor | None  # None where nothing is listed


class NativeBackend(NumpyBackend):
    """One adapter on a contiguous tensor is the library's work; what else there is goes NumPy's way."""

    name = "libshd"

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> list[Patch]:
        """Loading a tensor checks all of it; the file's bytes stay, compressed."""
        patches = []
        for tensor, target, dtype in tensors:
            decoder = tensor.decoder
            assert isinstance(decoder, NativeDecoder)
            loaded = LoadedTensor(decoder, tensor.record) if tensor.nnz else None
            patches.append(Patch(target, tensor.record, dtype, _Held(tensor, loaded)))
        return patches

    def positions(self, patch: Patch) -> Positions:
        """Decoded."""
        held: _Held = patch.data
        return held.tensor.positions()

    def payload(self, patch: Patch) -> Array:
        """Decoded."""
        held: _Held = patch.data
        return held.tensor.values() if patch.record.adds else held.tensor.bits()

    def apply(self, stacks: Sequence[Stack]) -> None:
        """In one pass where one adapter is on a tensor."""
        for stack in stacks:
            patch = stack[0].patch
            loaded, weight = self._fused(patch)
            if len(stack) > 1 or loaded is None or weight is None:
                super().apply([stack])
                continue
            # The bytes were checked and are ours, so from here on nothing can fail half-way.
            loaded.apply(weight, patch.dtype, stack[0].strength, stack[0].saved)
            stack[0].filled = True

    def restore(self, layers: Sequence[Layer]) -> None:
        """In one pass."""
        for layer in layers:
            loaded, weight = self._fused(layer.patch)
            if loaded is None or weight is None:
                super().restore([layer])
            else:
                loaded.revert(weight, layer.patch.dtype, layer.saved)

    def _fused(self, patch: Patch) -> tuple[LoadedTensor | None, Array | None]:
        """(the library's tensor, the weight's bits flat), where they go together."""
        held: _Held = patch.data
        array = elements(patch.target)
        return held.loaded, array.reshape(-1) if array.flags.c_contiguous else None
