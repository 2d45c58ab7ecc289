"""Exports to PEFT's SHiRA adapters: per layer `shira_weight` [nnz] and `shira_indices` [2, nnz]."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shiradelta.errors import DeltaError
from shiradelta.format.delta import TensorDelta
from shiradelta.models.peft import CONFIG, WEIGHTS, shira_key
from shiradelta.util.files import replacing
from shiradelta.util.optional import importing

from .layouts import export

_SUFFIX = ".weight"


def rank_of(deltas: Mapping[str, TensorDelta]) -> int:
    """PEFT's `r`: each layer has r·(rows + columns) nonzeros, with the same r in all."""
    return max((-(-delta.nnz // sum(delta.shape)) for delta in deltas.values()), default=0)


@export("peft-shira", "PEFT's SHiRA adapter, a folder for PeftModel.from_pretrained.")
def write(folder: str | os.PathLike[str], deltas: Mapping[str, TensorDelta], base: str = "") -> None:
    """Writes a PEFT SHiRA adapter.

    Layers with fewer nonzeros than PEFT wants are filled up with zeros.

    Args:
        folder: the adapter's folder; created if it does not exist.
        deltas: name of a linear layer's weight -> its delta.
        base: `base_model_name_or_path`.

    Raises:
        DeltaError: PEFT's SHiRA cannot hold the deltas, because they change something other than linear layers, are not
            additions, or are too dense.
        MissingDependencyError: safetensors is not installed.
        TargetError: the folder cannot be written.
    """
    with importing("an export to PEFT"):
        from safetensors.numpy import save

    for name, delta in deltas.items():
        if not name.endswith(_SUFFIX) or len(delta.shape) != 2 or not delta.operation.adds:
            what = f"{delta.op} with shape {list(delta.shape)}"
            raise DeltaError(f"tensor {name!r} is {what}; PEFT's SHiRA takes only additions to a linear layer's weight")
    if not deltas:
        raise DeltaError("there is no delta to export; PEFT's SHiRA has at least one layer")
    rank = rank_of(deltas)
    tensors = {}
    for name, delta in deltas.items():
        layer = name.removesuffix(_SUFFIX)
        positions, values = _filled(layer, delta, rank * sum(delta.shape))
        tensors[shira_key(layer, "values")] = values
        tensors[shira_key(layer, "indices")] = np.stack(np.divmod(positions, delta.shape[1])).astype(np.int32)
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        "target_modules": sorted(name.removesuffix(_SUFFIX) for name in deltas),
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / WEIGHTS) as stream:
        stream.write(save(tensors, {"format": "pt"}))
    with replacing(target / CONFIG) as stream:
        stream.write(json.dumps(config, indent=1).encode())


def _filled(layer: str, delta: TensorDelta, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and float32 values of a delta, filled up with zeros to `count` nonzeros."""
    numel = delta.numel
    if count > numel:
        raise DeltaError(f"layer {layer!r} has {numel} weights, PEFT wants {count} nonzeros in it; train fewer")
    positions = delta.positions()
    free = np.ones(numel, np.bool_)
    free[positions] = False
    filler = np.flatnonzero(free)[: count - positions.size]
    values = np.concatenate([delta.values(), np.zeros(filler.size, np.float32)])
    positions = np.concatenate([positions, filler])
    order = np.argsort(positions)
    return positions[order], values[order]
