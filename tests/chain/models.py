"""Tiny models as plain arrays of bits, written as folders; steps between them; a reference that replays steps."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta as sd
from shiradelta import TensorDelta
from shiradelta.folder.recode import recode
from shiradelta.format import arithmetic
from shiradelta.models.checkpoint import open_checkpoint

Array = np.ndarray[Any, Any]
#: Name -> (dtype, shape, flat bits).
Tensor = tuple[str, tuple[int, ...], Array]
Model = dict[str, Tensor]
_SAFETENSORS = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "uint8": "U8"}


def tensor(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "bfloat16"
) -> tuple[str, tuple[int, ...], Array]:
    values = rng.standard_normal(math.prod(shape)).astype(np.float32)
    if dtype == "uint8":
        return dtype, shape, rng.integers(0, 256, values.size).astype("u1")
    return dtype, shape, arithmetic.from_float32(values, dtype)


def small(seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    return {
        "layers.0.up.weight": tensor(rng, (24, 16)),
        "layers.0.norm.weight": tensor(rng, (16,), "float32"),
        "layers.1.up.weight": tensor(rng, (8, 8), "float16"),
        "mask": tensor(rng, (9,), "uint8"),
    }


def write(folder: Path, model: Model) -> Path:
    """A model's folder of one safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, bits) in model.items():
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    data = b"".join(bits.tobytes() for _, _, bits in model.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text('{"model_type": "test"}')
    return folder


def read(folder: Path) -> Model:
    checkpoint = open_checkpoint(folder)
    return {name: (slot.dtype.name, slot.shape, checkpoint.bits(name).copy()) for name, slot in checkpoint.items()}


def same(one: Model, other: Model) -> bool:
    return one.keys() == other.keys() and all(
        one[name][:2] == other[name][:2] and np.array_equal(one[name][2], other[name][2]) for name in one
    )


def change(model: Model, rng: np.random.Generator, share: float = 0.1) -> Model:
    """A model in which some elements have other bits."""
    changed = {}
    for name, (dtype, shape, bits) in model.items():
        at = rng.random(bits.size) < share
        noise = rng.integers(0, 8, bits.size).astype(bits.dtype)
        changed[name] = dtype, shape, np.where(at, bits ^ noise, bits)
    return changed


def set_step(before: Model, after: Model) -> dict[str, TensorDelta]:
    """What sets the elements that differ."""
    found = {}
    for name, (dtype, shape, bits) in after.items():
        old = before[name][2]
        at = np.flatnonzero(bits != old)
        found[name] = TensorDelta(shape, at, bits[at], dtype, "set", base_bits=old[at])
    return {name: delta for name, delta in found.items() if delta.nnz}


def add_step(before: Model, rng: np.random.Generator, share: float = 0.2) -> dict[str, TensorDelta]:
    """What adds random values to some elements."""
    found = {}
    for name, (dtype, shape, bits) in before.items():
        at = np.flatnonzero(rng.random(bits.size) < share)
        if dtype != "uint8":
            values = rng.standard_normal(at.size).astype(np.float32)
            found[name] = TensorDelta(shape, at, values, dtype, base_bits=bits[at])
    return found


def replayed(model: Model, step: Path) -> Model:
    """The model after a step, by the plain reading of FORMAT.md, 6.1; made plain first, if it is read with its base."""
    after = dict(model)
    with sd.open_delta(step) as delta, tempfile.TemporaryDirectory() as folder:
        if delta.needs_base:
            recode(delta, plain := Path(folder) / "plain.shd", write(Path(folder) / "base", model), context="none")
            return replayed(model, plain)
        for name, one in delta.items():
            if not one.operation.in_result:
                del after[name]
            elif one.operation.creates:
                after[name] = one.dtype, one.shape, one.bits().copy()
            else:
                bits, at = after[name][2].copy(), one.positions()
                bits[at] = arithmetic.result(one.operation, one.bits(), bits[at], one.dtype, 1)
                after[name] = one.dtype, one.shape, bits
    return after
