"""libshd on live CPU tensors: decoded, added, rounded and saved in one pass, on several threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shiradelta.arithmetic import Array, Positions
from shiradelta.codecs.base import Bytes
from shiradelta.engine.live import Target
from shiradelta.engine.live_backend import Held, Patch, Place, Stack
from shiradelta.engine.numpy_backend import NumpyBackend, elements
from shiradelta.native import LoadedTensor, NativeDecoder
from shiradelta.reader import StoredTensor


class _Data(NamedTuple):
    """A tensor's delta for NumPy's way, and the same for the library's."""

    tensor: StoredTensor
    loaded: LoadedTensor | None  # None where nothing is listed


class NativeBackend(NumpyBackend):
    """One adapter on a contiguous tensor is the library's work; what else there is goes NumPy's way."""

    name = "libshd"

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> Held:
        """Loading a tensor checks all of it; the file's bytes stay, compressed."""
        patches = []
        for tensor, target, dtype in tensors:
            decoder = tensor.decoder
            assert isinstance(decoder, NativeDecoder)
            loaded = LoadedTensor(decoder, tensor.record) if tensor.nnz else None
            patches.append(Patch(target, tensor.record, dtype, _Data(tensor, loaded)))
        return Held(patches, sum(patch.record.index.stored + patch.record.values.stored for patch in patches))

    def positions(self, patch: Patch) -> Positions:
        """Decoded."""
        held: _Data = patch.data
        return held.tensor.positions()

    def payload(self, patch: Patch) -> Array:
        """Decoded."""
        held: _Data = patch.data
        return held.tensor.values() if patch.record.adds else held.tensor.bits()

    def apply(self, stack: Stack) -> None:
        """In one pass where one adapter is on the tensor."""
        patch, (layer, number) = stack[0].patch, stack[0]
        loaded, weight = self._fused(patch)
        if len(stack) > 1 or loaded is None or weight is None:
            super().apply(stack)
            return
        # The bytes were checked and are ours, so from here on nothing can fail half-way.
        loaded.apply(weight, patch.dtype, layer.strength, self.saved(stack[0]))
        layer.filled[number] = True

    def restore_one(self, place: Place) -> None:
        """In one pass."""
        loaded, weight = self._fused(place.patch)
        if loaded is None or weight is None:
            super().restore_one(place)
        else:
            loaded.revert(weight, place.patch.dtype, self.saved(place))

    def _fused(self, patch: Patch) -> tuple[LoadedTensor | None, Array | None]:
        """(the library's tensor, the weight's bits flat), where they go together."""
        held: _Data = patch.data
        array = elements(patch.target)
        return held.loaded, array.reshape(-1) if array.flags.c_contiguous else None
