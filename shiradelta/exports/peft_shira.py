"""Exports to PEFT's SHiRA adapters: per layer `shira_weight` [nnz] and `shira_indices` [2, nnz]."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.models.peft import shira_key
from shiradelta.util.progress import Progress

from .adapter import write_nonzeros
from .base import linear_layers
from .layouts import export

_WHAT = "PEFT's SHiRA"


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
    config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "random_seed": 0}
    write_nonzeros(folder, config, layers, base, shira_key, counts, _rows_and_columns, progress)


def _rows_and_columns(positions: Positions, delta: TensorDelta) -> Array:
    return np.stack(np.divmod(positions, delta.shape[1]))
