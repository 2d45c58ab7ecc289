"""Writes PEFT's adapter folders: the weights and the configuration, both or neither."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.peft import CONFIG, WEIGHTS
from shiradelta.models.safetensors import Unwritten, write_tensors
from shiradelta.util.files import os_errors, replacing
from shiradelta.util.progress import Progress

#: (layer, "values" or "indices") -> the name of a tensor.
Key = Callable[[str, str], str]
#: Bytes that `_padded` takes for each nonzero.
_PADDED = 40


def stored(name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Array]) -> Unwritten:
    """A tensor of an adapter; `read` gives an array of numbers of that dtype, by torch's name."""
    return Unwritten(name, shape, DTYPE_OF_NAME[dtype], read)


def write_nonzeros(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    layers: Mapping[str, TensorDelta],
    base: str,
    key: Key,
    counts: Mapping[str, int],
    where: Callable[[Positions, TensorDelta], Array],
    progress: Progress | None = None,
) -> None:
    """Writes an adapter that has values and indices of each layer, filled up with zeros to as many as PEFT wants.

    Args:
        folder: the adapter's folder.
        config: what the configuration says of the adapter's type.
        layers: layer -> its delta.
        base: `base_model_name_or_path`.
        key: (layer, "values" or "indices") -> the tensor's name.
        counts: layer -> nonzeros that PEFT wants.
        where: (flat positions, the layer's delta) -> indices as PEFT has them, with the positions along the last
            dimension.
        progress: called with (tensor, done, total).

    Raises:
        DeltaError: a layer has fewer weights than PEFT wants nonzeros in it.
        LimitError: they take more memory than the limit of the open file.
        TargetError: the folder cannot be written.
    """
    for layer, delta in layers.items():
        _check_room(layer, delta, counts[layer])
    nonzeros = lru_cache(1)(lambda layer: _padded(layers[layer], counts[layer]))  # values and indices of one layer

    def values(layer: str) -> Array:
        return nonzeros(layer)[1]

    def indices(layer: str) -> Array:
        return where(nonzeros(layer)[0], layers[layer]).astype(np.int32)

    tensors = []
    for layer, count in counts.items():
        shape = where(np.zeros(0, np.int64), layers[layer]).shape[:-1]
        tensors.append(stored(key(layer, "values"), (count,), "float32", partial(values, layer)))
        tensors.append(stored(key(layer, "indices"), (*shape, count), "int32", partial(indices, layer)))
    write_adapter(folder, config, layers, base, tensors, progress)


def _check_room(layer: str, delta: TensorDelta, count: int) -> None:
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


def _padded(delta: TensorDelta, count: int) -> tuple[Positions, Float32]:
    """Positions and float32 values of a delta, filled up with zeros to `count` nonzeros."""
    positions, lacking = delta.positions(), count - delta.nnz
    # The first positions that are free are among the first `count`.
    free = np.setdiff1d(np.arange(count), positions, assume_unique=True)[:lacking]
    values = np.concatenate([delta.values(), np.zeros(free.size, np.float32)])
    positions = np.concatenate([positions, free])
    order = np.argsort(positions)
    return positions[order], values[order]


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    modules: Iterable[str],
    base: str,
    tensors: Iterable[Unwritten],
    progress: Progress | None = None,
) -> None:
    """Writes an adapter's folder, which is created if it does not exist.

    Args:
        folder: the folder.
        config: what the configuration says of the adapter's type.
        modules: the names of the layers.
        base: `base_model_name_or_path`.
        tensors: the weights.
        progress: called with (tensor, done, total).

    Raises:
        TargetError: it cannot be written.
    """
    about = {
        **config,
        "target_modules": sorted(modules),
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
    }
    target = Path(folder)
    existed = target.exists()
    with os_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target / CONFIG) as stream, replacing(target / WEIGHTS) as weights:
            stream.write(json.dumps(about, indent=1).encode())
            write_tensors(weights, tensors, {"format": "pt"}, progress)
    except BaseException:
        if not existed:
            with suppress(OSError):
                target.rmdir()
        raise
