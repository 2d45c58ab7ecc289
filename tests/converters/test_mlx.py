"""Adapters of MLX-LM: its names, its order of dimensions and its scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
EXPERTS = "model.layers.1.mlp.experts"
SHAPES = {
    f"{Q}.weight": (6, 8),
    f"{EMBED}.weight": (10, 8),
    **{f"{EXPERTS}.{expert}.up_proj.weight": (5, 8) for expert in range(3)},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    return write_model(tmp_path / "base", {k: torch.randn(shape, generator=generator) for k, shape in SHAPES.items()})


def factors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        f"{Q}.lora_a": (8, 2),
        f"{Q}.lora_b": (2, 6),
        f"{EMBED}.lora_a": (10, 2),
        f"{EMBED}.lora_b": (2, 8),
        "model.layers.1.mlp.switch_mlp.up_proj.lora_a": (3, 2, 8),
        "model.layers.1.mlp.switch_mlp.up_proj.lora_b": (3, 5, 2),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], file: str = "adapters.safetensors", **about: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if file.endswith(".npz"):
        np.savez(folder / file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        save_file(tensors, folder / file)
    about = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}, **about}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def changes(source: Path, base: Path, **options: Any) -> dict[str, torch.Tensor]:
    shiradelta.convert(source, base.parent / "x.shd", 1.0, base, "f32", **options)
    with shiradelta.open_delta(base.parent / "x.shd") as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapters.npz"])
def test_linear_layers_embeddings_and_experts(tmp_path: Path, base: Path, file: str):
    held = factors()
    folder = write(tmp_path / "adapter", held, file)
    stack = "model.layers.1.mlp.switch_mlp.up_proj"
    wanted = {
        f"{Q}.weight": held[f"{Q}.lora_b"].T @ held[f"{Q}.lora_a"].T,
        f"{EMBED}.weight": held[f"{EMBED}.lora_a"] @ held[f"{EMBED}.lora_b"],
        **{f"{EXPERTS}.{e}.up_proj.weight": held[f"{stack}.lora_b"][e] @ held[f"{stack}.lora_a"][e] for e in range(3)},
    }
    for source in (folder, folder / file):
        found = changes(source, base)
        assert found.keys() == wanted.keys()
        for name, change in wanted.items():
            torch.testing.assert_close(found[name], 3.0 * change)
    found = changes(folder, base, alpha=1.0)
    torch.testing.assert_close(found[f"{Q}.weight"], 0.5 * wanted[f"{Q}.weight"])


def test_a_full_fine_tune(tmp_path: Path, base: Path):
    tuned = torch.randn(6, 8)
    found = changes(write(tmp_path / "adapter", {f"{Q}.weight": tuned}, fine_tune_type="full"), base)
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert list(delta) == [f"{Q}.weight"]
    assert list(found) == [f"{Q}.weight"]


@pytest.mark.parametrize(
    ("drop", "put", "about", "message"),
    [
        (f"{Q}.lora_b", {}, {}, f"'{Q}' has lora_a, and a lora of MLX-LM lora_a lora_b"),
        ("", {f"{Q}.m": (6,)}, {}, "has lora_a lora_b m, and a lora of MLX-LM lora_a lora_b; put the adapter_config"),
        ("", {}, {"fine_tune_type": "dora"}, "and a dora of MLX-LM lora_a lora_b m"),
        ("", {f"{Q}.lora_b": (3, 6)}, {}, "do not multiply"),
        ("", {f"{Q}.lora_b": (1, 2, 6)}, {}, "which are no pair"),
        ("", {f"{Q}.lora_A.weight": (2, 8)}, {}, "is neither a factor nor a length"),
        ("", {}, {"lora_parameters": {"rank": 2}}, "does not say the scale"),
        ("", {}, {"lora_parameters": {"scale": 2, "alpha": 4}}, "has a scale and an alpha; MLX-LM before 0.19"),
        ("", {}, {"lora_parameters": {"scale": "x"}}, "scale 'x' is not a finite number"),
        ("", {}, {"fine_tune_type": "oft"}, "fine_tune_type is 'oft', none of lora, dora, full"),
    ],
)
def test_what_does_not_fit_together(
    tmp_path: Path, base: Path, drop: str, put: dict[str, tuple[int, ...]], about: dict[str, Any], message: str
):
    held = {key: tensor for key, tensor in factors().items() if key != drop}
    held |= {key: torch.randn(shape) for key, shape in put.items()}
    with pytest.raises(SourceError, match=message) as caught:
        changes(write(tmp_path / "adapter", held, **about), base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is damaged"),
        (lambda path: np.savez(path, **{f"{Q}.lora_a": np.array([{}], object)}), "is damaged"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is damaged"),
        (lambda path: np.savez(path, **{f"{Q}.lora_a": np.zeros((8, 2), ">f4")}), "is >f4"),
    ],
)
def test_damaged_arrays(tmp_path: Path, base: Path, damage: Any, message: str):
    folder = write(tmp_path / "adapter", factors(), "adapters.npz")
    damage(folder / "adapters.npz")
    with pytest.raises(SourceError, match=message):
        changes(folder, base)
