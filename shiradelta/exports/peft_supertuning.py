"""Exports to PEFT's Supertuning adapters: per layer `supertuning_values` [nnz] and flat `supertuning_indices` [nnz]."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shiradelta.errors import DeltaError
from shiradelta.format.delta import TensorDelta
from shiradelta.models.peft import PREFIX
from shiradelta.util.progress import Progress

from .adapter import write_nonzeros
from .base import linear_layers
from .layouts import Written, export

#: PEFT's indices are int32.
_LIMIT = 1 << 31
_NARROW = ("float16", "bfloat16")
_ROUNDED = (
    "PEFT rounds Supertuning's values to the weights' {dtype} before it adds them, so some weights will differ from"
    " what apply gives; peft-shira gives the same"
)


def sparsity_of(deltas: Mapping[str, TensorDelta]) -> float:
    """PEFT's `sparsity`, the same in all layers, with which each has room for its delta."""
    wanted = [(delta.numel, max(delta.nnz, 1)) for delta in deltas.values()]
    sparsity = 1 - max(nnz / numel for numel, nnz in wanted)
    while any(count_of(numel, sparsity) < nnz for numel, nnz in wanted):  # PEFT's product was rounded downwards
        sparsity -= 2**-52
    return max(sparsity, 0.0)


def count_of(numel: int, sparsity: float) -> int:
    """How many nonzeros PEFT wants in a layer, by its own arithmetic."""
    return int(numel * (1 - sparsity))


@export(
    "peft-supertuning",
    "PEFT's Supertuning adapter (PEFT 0.21), a folder for PeftModel.from_pretrained.",
    options=("model", "progress"),
)
def write(
    folder: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Writes a PEFT Supertuning adapter, with its indices.

    Layers with fewer nonzeros than PEFT wants are filled up with zeros.

    Args:
        folder: the adapter's folder; created if it does not exist.
        deltas: name of a linear layer's weight -> its delta.
        base: `base_model_name_or_path`.
        model: the base's files; see `linear_layers`.
        progress: called with (what, done, total).

    Returns:
        A warning if the delta is for weights in 16 bits.

    Raises:
        DeltaError: Supertuning cannot hold the deltas, because they change something other than linear layers, or are
            not additions.
        TargetError: the folder cannot be written.
    """
    layers = linear_layers(deltas, "PEFT's Supertuning", model, progress)
    sparsity = sparsity_of(layers)
    counts = {layer: count_of(delta.numel, sparsity) for layer, delta in layers.items()}
    for layer, delta in layers.items():
        if delta.numel > _LIMIT:
            raise DeltaError(f"layer {layer!r} has {delta.numel:,} weights, more than PEFT's 32-bit indices reach")
    config = {"peft_type": "SUPERTUNING", "sparsity": sparsity, "save_precomputed_indices": True}
    write_nonzeros(folder, config, layers, base, _key, counts, lambda positions, delta: positions, progress)
    narrow = sorted({delta.dtype for delta in layers.values()} & set(_NARROW))
    return Written(warnings=tuple(_ROUNDED.format(dtype=dtype) for dtype in narrow))


def _key(layer: str, part: str) -> str:
    return f"{PREFIX}{layer}.supertuning_{part}"
