"""Exports to PEFT's SHiRA adapters: per layer `shira_weight` [nnz] and `shira_indices` [2, nnz]."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache, partial

import numpy as np

from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.models.peft import shira_key
from shiradelta.util.progress import Progress

from .adapter import stored, write_adapter
from .base import linear_layers
from .layouts import export

_WHAT = "PEFT's SHiRA"
#: Bytes that `padded` takes for each nonzero.
_PADDED = 40


def rank_of(deltas: Mapping[str, TensorDelta]) -> int:
    """PEFT's `r`: each layer has r·(rows + columns) nonzeros, with the same r in all."""
    return max(1, *(-(-delta.nnz // sum(delta.shape)) for delta in deltas.values()))


@export("peft-shira", "PEFT's SHiRA adapter, a folder for PeftModel.from_pretrained.", options=("model", "progress"))
def write(
    folder: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a PEFT SHiRA adapter.

    Layers with fewer nonzeros than PEFT wants are filled up with zeros.

    Args:
        folder: the adapter's folder; created if it does not exist.
        deltas: name of a linear layer's weight -> its delta.
        base: `base_model_name_or_path`.
        model: the base's files; see `linear_layers`.
        progress: called with (what, done, total).

    Raises:
        DeltaError: PEFT's SHiRA cannot hold the deltas, because they change something other than linear layers, are not
            additions, or are too dense.
        TargetError: the folder cannot be written.
    """
    layers = linear_layers(deltas, _WHAT, model, progress)
    rank = rank_of(layers)
    counts = {layer: rank * sum(delta.shape) for layer, delta in layers.items()}
    for layer, delta in layers.items():
        check_room(layer, delta, counts[layer])
    nonzeros = lru_cache(1)(lambda layer: padded(layers[layer], counts[layer]))  # values and indices of one layer

    def values(layer: str) -> Array:
        return nonzeros(layer)[1]

    def indices(layer: str) -> Array:
        return np.stack(np.divmod(nonzeros(layer)[0], layers[layer].shape[1])).astype(np.int32)

    tensors = []
    for layer, count in counts.items():
        key, where = shira_key(layer, "values"), shira_key(layer, "indices")
        tensors.append(stored(key, (count,), "float32", partial(values, layer)))
        tensors.append(stored(where, (2, count), "int32", partial(indices, layer)))
    config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "random_seed": 0}
    write_adapter(folder, config, layers, base, tensors, progress)


def check_room(layer: str, delta: TensorDelta, count: int) -> None:
    """Checks that a layer has as many weights as PEFT wants nonzeros in it, and that these may be made.

    Raises:
        DeltaError: it has fewer.
        LimitError: they take more memory than the limit of the open file.
    """
    if count > delta.numel:
        raise DeltaError(
            f"layer {layer!r} has {delta.numel} weights, PEFT wants {count} nonzeros in it; make a sparser delta"
        )
    delta.check_memory(_PADDED * count)


def padded(delta: TensorDelta, count: int) -> tuple[Positions, Float32]:
    """Positions and float32 values of a delta, filled up with zeros to `count` nonzeros."""
    positions, lacking = delta.positions(), count - delta.nnz
    # The first positions that are free are among the first `count`.
    free = np.setdiff1d(np.arange(count), positions, assume_unique=True)[:lacking]
    values = np.concatenate([delta.values(), np.zeros(free.size, np.float32)])
    positions = np.concatenate([positions, free])
    order = np.argsort(positions)
    return positions[order], values[order]
