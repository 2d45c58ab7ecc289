"""Exports to PEFT's LoRA adapters: the factors of each layer's delta, by its singular values."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from shiradelta.errors import ArgumentError
from shiradelta.format.arithmetic import Array
from shiradelta.format.delta import TensorDelta
from shiradelta.models.peft import PREFIX
from shiradelta.util.progress import Progress
from shiradelta.util.text import percent

from .adapter import stored, write_adapter
from .base import linear_layers
from .layouts import Written, export
from .low_rank import factors_of

DEFAULT_RANK = 16
#: A warning says what is lost where less of the energy is kept.
_LITTLE = 0.9


@export(
    "peft-lora",
    "PEFT's LoRA adapter, by the singular values of each layer's delta; says what it loses.",
    options=("model", "rank", "energy", "progress"),
)
def write(
    folder: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress | None = None,
) -> Written:
    """Writes a LoRA that is as near to the deltas as its ranks allow.

    Args:
        folder: the adapter's folder; created if it does not exist.
        deltas: name of a linear layer's weight -> its delta.
        base: `base_model_name_or_path`.
        model: the base's files; see `linear_layers`.
        rank: the rank of each layer; 16 by default.
        energy: instead, the share of each delta's squared norm to keep, above 0 and up to 1; ranks follow from it.
        progress: called with (what, done, total).

    Returns:
        The share of the squared norm of all deltas that the factors keep, and each layer's rank.

    Raises:
        ArgumentError: rank or energy are out of range, or both are given.
        DeltaError: a delta changes something other than a linear layer, or is not an addition.
        TargetError: the folder cannot be written.
    """
    if rank is not None and energy is not None:
        raise ArgumentError("rank and energy exclude each other; give one of them")
    if energy is not None and not 0 < energy <= 1:
        raise ArgumentError(f"energy {energy:g} is no share; give a number above 0 and up to 1, such as 0.9")
    if rank is not None and rank < 1:
        raise ArgumentError(f"rank {rank} is less than 1; give a rank such as {DEFAULT_RANK}")
    rank = DEFAULT_RANK if rank is None and energy is None else rank
    layers = linear_layers(deltas, "PEFT's LoRA", model, progress)
    ranks: dict[str, int] = {}
    kept = total = 0.0
    # The header of the file needs all ranks, so the factors are kept on disk until these are known.
    with tempfile.TemporaryDirectory(prefix="shiradelta-") as scratch:
        tensors = []
        for number, (layer, delta) in enumerate(layers.items()):
            if progress:
                progress(layer, number, len(layers))
            left, right, squares = factors_of(delta, rank, energy)
            ranks[layer], kept = left.shape[1], kept + squares
            total += float(np.square(delta.values().astype(np.float64)).sum())
            for name, factor in (("lora_A", right), ("lora_B", left)):
                file = Path(scratch) / f"{number}.{name}"
                factor.tofile(file)
                tensors.append(stored(f"{PREFIX}{layer}.{name}.weight", factor.shape, "float32", partial(_read, file)))
        most = max(ranks.values())
        other = {layer: one for layer, one in ranks.items() if one != most}
        config = {"peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other}
        write_adapter(folder, config, layers, base, tensors)
    share = min(kept / total, 1.0) if total else 1.0
    few = f"the LoRA keeps {percent(share)} of the delta's energy; a higher rank keeps more, and peft-shira keeps all"
    return Written(share, ranks, (few,) if share < _LITTLE else ())


def _read(file: Path) -> Array:
    return np.fromfile(file, np.float32)
