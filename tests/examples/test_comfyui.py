"""The node for ComfyUI, on stand-ins of what it calls there: patchers, names for LoRAs, folders."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shiradelta as sd
from shiradelta.errors import BaseMismatchError
from tests.swapping import bits, random_delta


class Patcher:
    """What ComfyUI calls a ModelPatcher: a module, and patches that clones have of their own."""

    def __init__(self, model: Any, patches: dict[str, list[Any]] | None = None) -> None:
        self.model, self.patches, self.backup = model, patches or {}, {}

    def clone(self) -> Patcher:
        return Patcher(self.model, {key: list(value) for key, value in self.patches.items()})

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch))

    def weight(self, key: str) -> torch.Tensor:
        """As ComfyUI computes it: in float32, patch after patch, rounded at the end."""
        weight = self.model.state_dict()[key]
        made = weight.detach().float().clone()
        for strength, patch in self.patches.get(key, []):
            made = patch.calculate_weight(made, key, strength, 1.0, None, lambda a: a, torch.float32)
        return made.to(weight.dtype)


class Clip:
    def __init__(self, patcher: Patcher) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        self.patcher.add_patches(patches, strength)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported where `comfy` is a stand-in."""
    comfy, lora, adapters = (types.ModuleType(f"comfy{part}") for part in ("", ".lora", ".weight_adapter"))
    folders = types.ModuleType("folder_paths")
    comfy.lora, comfy.weight_adapter = lora, adapters  # type: ignore[attr-defined]
    lora.model_lora_keys_unet = lambda model, keys: {"unet.down.0": "diffusion_model.input.0.weight"}  # type: ignore[attr-defined]
    lora.model_lora_keys_clip = lambda model, keys: {"text_encoder.layer.0": "clip.layer.0.weight"}  # type: ignore[attr-defined]
    adapters.WeightAdapterBase = type("WeightAdapterBase", (), {})  # type: ignore[attr-defined]
    folders.get_filename_list = lambda kind: sorted(path.name for path in tmp_path.iterdir())  # type: ignore[attr-defined]
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)  # type: ignore[attr-defined]
    for module in (comfy, lora, adapters, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import examples.comfyui.nodes as found

    yield found
    for name in [name for name in sys.modules if name.startswith("examples.comfyui")]:
        del sys.modules[name]


def module(**layers: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({name: torch.nn.ModuleDict({"0": layer}) for name, layer in layers.items()}).to(
        torch.bfloat16
    )


def patchers() -> tuple[Patcher, Clip]:
    torch.manual_seed(0)
    unet = torch.nn.Module()
    unet.diffusion_model = module(input=torch.nn.Linear(11, 9), output=torch.nn.Linear(11, 9))
    text = torch.nn.Module()
    text.clip = module(layer=torch.nn.Linear(11, 9))
    return Patcher(unet), Clip(Patcher(text))


def write(path: Path, model: Patcher, clip: Clip, **other: Any) -> Path:
    """A delta with names of a checkpoint in one file, and of diffusers."""
    first, last = model.model.diffusion_model["input"]["0"].weight, model.model.diffusion_model["output"]["0"].weight
    tensors = {
        "unet/down.0.weight": random_delta((9, 11), 12, 1, "bfloat16", base=first),
        "model.diffusion_model.output.0.weight": random_delta((9, 11), 12, 2, "bfloat16", base=last),
        "text_encoder/layer.0.weight": random_delta(
            (9, 11), 12, 3, "bfloat16", base=clip.patcher.model.clip["layer"]["0"].weight
        ),
        **other,
    }
    sd.save_delta(path, tensors, values="f32")
    return path


KEYS = {
    "unet/down.0.weight": "diffusion_model.input.0.weight",
    "model.diffusion_model.output.0.weight": "diffusion_model.output.0.weight",
    "text_encoder/layer.0.weight": "clip.layer.0.weight",
}


def test_the_weights_are_those_that_a_switch_gives(nodes: Any, tmp_path: Path):
    model, clip = patchers()
    path = write(tmp_path / "look.shd", model, clip)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert nodes.LoadDelta.INPUT_TYPES()["required"]["delta"] == (["look.shd"],)
    node = nodes.NODE_CLASS_MAPPINGS["ShiradeltaLoad"]()
    patched, text = getattr(node, node.FUNCTION)(model, "look.shd", 0.8, clip, 0.5)
    bases = {
        key: (text.patcher if key.startswith("clip.") else patched).model.state_dict()[key] for key in KEYS.values()
    }
    weights = {name: bases[key].clone() for name, key in KEYS.items()}
    swap = sd.load(weights, path, {"text_encoder": 0.5, "*": 0.8})
    assert swap.active
    for name, key in KEYS.items():
        made = (text.patcher if key.startswith("clip.") else patched).weight(key)
        assert (bits(made) == bits(weights[name])).all(), name
        assert (bits(made) != bits(bases[key])).any(), name
    assert not model.patches  # the one that was given is as it was
    assert not clip.patcher.patches


def test_what_does_not_fit_is_refused_and_nothing_is_patched(nodes: Any, tmp_path: Path):
    model, clip = patchers()
    load = nodes.LoadDelta().load
    write(tmp_path / "look.shd", model, clip)
    with pytest.raises(
        BaseMismatchError, match=r"'text_encoder/layer\.0\.weight' is not in the model; connect the CLIP"
    ):
        load(model, "look.shd", 1.0)
    write(tmp_path / "more.shd", model, clip, vae=random_delta((9, 11), 3, 4))
    with pytest.raises(BaseMismatchError, match="tensor 'vae' is not in the model; load the base"):
        load(model, "more.shd", 1.0, clip)
    key = "model.diffusion_model.output.0.weight"
    write(tmp_path / "shape.shd", model, clip, **{key: random_delta((9, 12), 3, 4)})
    with pytest.raises(BaseMismatchError, match=r"has shape \[9, 12\], the model's \[9, 11\]"):
        load(model, "shape.shd", 1.0, clip)
    weight = model.model.diffusion_model["output"]["0"].weight
    write(tmp_path / "set.shd", model, clip, **{key: random_delta((9, 11), 3, 4, "bfloat16", op="set", base=weight)})
    with pytest.raises(BaseMismatchError, match="is set, not added"):
        load(model, "set.shd", 1.0, clip)
    with torch.no_grad():
        weight += 1
    with pytest.raises(BaseMismatchError, match="was made for another base"):
        load(model, "look.shd", 1.0, clip)
    model.backup["diffusion_model.output.0.weight"] = types.SimpleNamespace(weight=(weight - 1).detach())
    assert not model.patches


def test_a_weight_that_comfyui_has_patched_is_compared_by_its_backup(nodes: Any, tmp_path: Path):
    model, clip = patchers()
    write(tmp_path / "look.shd", model, clip)
    weight = model.model.diffusion_model["output"]["0"].weight
    model.backup["diffusion_model.output.0.weight"] = types.SimpleNamespace(weight=weight.detach().clone())
    with torch.no_grad():
        weight += 1
    patched, _ = nodes.LoadDelta().load(model, "look.shd", 1.0, clip)
    assert set(patched.patches) == {key for key in KEYS.values() if key.startswith("diffusion_model")}
