"""Saves trained nonzeros: as deltas, as a `.shd` file, and as a PEFT SHiRA adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError
from shiradelta.exports.layouts import find_layout
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.draw import Draw
from shiradelta.hotswap.ranks import Ranks
from shiradelta.io.writer import weighing, writing
from shiradelta.train.tuned import TunedWeight
from shiradelta.util.arrays import join_sorted


def deltas(tuned: Mapping[str, TunedWeight]) -> dict[str, TensorDelta]:
    """The trained deltas, by the checkpoint's names; values that are still zero are left out.

    Raises:
        DeltaError: nothing is trained yet, training gave NaN or infinity, or the model was cast.
    """
    parts: dict[str, list[tuple[Positions, Float32, Array]]] = {}  # several weights may be stored in one tensor
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    draws: dict[str, Draw] = {}
    for name, one in tuned.items():
        nonzeros = one.nonzeros
        if one.weight is not None and one.weight.dtype != nonzeros.stored:
            raise DeltaError(
                f"tensor {name!r} was cast to {one.weight.dtype} while it was trained; cast the model first, then"
                " attach"
            )
        values = one.gathered(nonzeros.masked(one.changes().to(nonzeros.positions.device)))
        if not torch.isfinite(values).all():
            raise DeltaError(
                f"training gave NaN or infinity in tensor {name!r}; go back to an earlier state, with a smaller"
                " learning rate or with gradients clipped"
            )
        changed = values.nonzero().reshape(-1)
        positions = one.whole_positions()[changed].cpu().numpy()
        numbers, base = values[changed].cpu().numpy(), _bits(one.gathered(nonzeros.base)[changed])
        draws |= one.draws
        dtype = str(nonzeros.stored).removeprefix("torch.")
        for view in one.views:
            order, where = view.from_weight(positions)
            if order.size:
                parts.setdefault(view.name, []).append((where, numbers[order], base[order]))
                kinds[view.name] = view.shape, dtype
    if not parts:
        raise DeltaError("all values are zero: nothing was trained yet")
    found = {}
    for name, some in parts.items():
        shape, dtype = kinds[name]
        positions, joined = join_sorted([(where, numbers) for where, numbers, _ in some])
        _, bits = join_sorted([(where, base) for where, _, base in some])
        found[name] = TensorDelta(shape, positions, joined, dtype, base_bits=bits, draw=draws.get(name))
    return found


def save(
    path: str | os.PathLike[str], found: Mapping[str, TensorDelta], values: str, metadata: Mapping[str, str]
) -> float:
    """Writes a `.shd` file in the first process; returns |stored - trained| / |trained|."""
    missed = trained = 0.0
    with writing(path, values) if _is_first_process() else nullcontext(weighing(values)) as writer:
        writer.metadata.update(metadata)
        for name, delta in found.items():
            wanted = delta.values().astype(np.float64)
            missed += float(np.square(writer.add(name, delta).values() - wanted).sum())
            trained += float(np.square(wanted).sum())
    return math.sqrt(missed / trained)


def export(
    folder: str | os.PathLike[str],
    model: nn.Module,
    tuned: Mapping[str, TunedWeight],
    layout: str,
    base: str,
    crew: Ranks,
) -> dict[str, TensorDelta]:
    """Writes the trained nonzeros in an export layout; returns them, zeros included, by the model's names.

    Raises:
        ArgumentError: the layout is unknown, or needs the model's files.
        DeltaError: a weight is not that of a linear layer, or the layout cannot hold the deltas.
    """
    write = find_layout(layout, ()).write
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for name, one in tuned.items():
        layer = name.removesuffix(".weight")
        if layer not in linear or layer == name:
            raise DeltaError(f"tensor {name!r} is not the weight of a linear layer, which is all that exports take")
        shape = tuple(linear[layer]._parameters["weight"].shape)  # type: ignore[union-attr]
        values = one.changes()
        numbers = one.gathered(values[one.kept.to(values.device)]).cpu().numpy()
        found[name] = TensorDelta(shape, one.positions.cpu().numpy(), numbers, "unspecified")
    is_writer = crew.alone or _is_first_process()
    crew.agree("export()", lambda: write(folder, found, base) if is_writer else None)
    return found


def _bits(weights: Tensor) -> Any:
    size = weights.element_size()
    return weights.cpu().view(torch.uint8).numpy().view(f"<u{size}")


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
