"""Exports: what other libraries read is what was exported, and what they cannot hold is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import shiradelta
from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.exports import EXPORTS, export, peft_shira
from shiradelta.format.delta import TensorDelta
from tests.conftest import random_tensors, write_model
from tests.converters.test_convert import stored

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def change(shape: tuple[int, int], count: int, seed: int = 0) -> TensorDelta:
    generator = np.random.default_rng(seed)
    positions = np.sort(generator.choice(shape[0] * shape[1], count, replace=False))
    return TensorDelta(shape, positions, generator.standard_normal(count).astype(np.float32), "unspecified")


@pytest.mark.parametrize("name", EXPORTS)
def test_every_layout_says_what_it_writes(name: str):
    assert EXPORTS[name].help.endswith(".")


def test_a_shira_adapter_has_as_many_nonzeros_in_each_layer_as_peft_wants(tmp_path: Path):
    deltas = {UP: change((96, 32), 300), DOWN: change((32, 96), 7, seed=1)}
    peft_shira.write(tmp_path / "peft", deltas, "some/base")
    assert peft_shira.rank_of(deltas) == 3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("SHIRA", 3, "some/base")
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, delta in deltas.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        indices, values = held[f"{prefix}.shira_indices"], held[f"{prefix}.shira_weight"]
        assert (indices.dtype, values.dtype) == (np.int32, np.float32)
        assert indices.shape == (2, 3 * 128)
        flat = indices[0].astype(np.int64) * delta.shape[1] + indices[1]
        assert np.all(np.diff(flat) > 0)
        dense = np.zeros(delta.numel, np.float32)
        dense[flat] = values
        assert np.array_equal(dense.reshape(delta.shape), delta.to_dense())


def test_an_export_is_converted_back(tmp_path: Path):
    import torch

    base = write_model(tmp_path / "base", random_tensors(torch.float32))
    deltas = {UP: change((96, 32), 300), DOWN: change((32, 96), 290, seed=1)}
    EXPORTS.find("peft-shira").write(tmp_path / "peft", deltas, "")
    shiradelta.convert(tmp_path / "peft", tmp_path / "back.shd", base=base, values="f32")
    for name, delta in deltas.items():
        assert np.array_equal(stored(tmp_path / "back.shd", name), delta.to_dense())


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({}, "no delta"),
        ({"norm.weight": TensorDelta((8,), [1], [1.0], "unspecified")}, r"shape \[8\]"),
        ({"layer.bias": change((8, 8), 2)}, "layer.bias"),
        ({"a.weight": TensorDelta((8, 8), [1], np.ones(1, np.float32), "float32", "set")}, "is set with"),
        ({"a.weight": change((4, 5), 19)}, "PEFT wants 27 nonzeros in it; make a sparser delta"),
    ],
)
def test_what_peft_cannot_hold_is_refused(deltas: dict[str, TensorDelta], message: str, tmp_path: Path):
    with pytest.raises(DeltaError, match=message):
        peft_shira.write(tmp_path / "peft", deltas)
    assert not (tmp_path / "peft").exists()


def test_a_layout_is_added_from_outside(tmp_path: Path):
    @export("names", "The names alone.")
    def write(path: str | os.PathLike[str], deltas: Mapping[str, TensorDelta], base: str) -> None:
        Path(path).write_text("\n".join([base, *deltas]))

    try:
        EXPORTS.find("names").write(tmp_path / "names", {UP: change((96, 32), 3)}, "base")
        assert (tmp_path / "names").read_text() == f"base\n{UP}"
        with pytest.raises(ArgumentError, match="'names' is registered already"):
            export("names", "Again.")(write)
    finally:
        EXPORTS.remove("names")
    with pytest.raises(ArgumentError, match="export layout 'names' is unknown; take dense"):
        EXPORTS.find("names")
