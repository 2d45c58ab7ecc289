"""LoRA of Stable Diffusion's U-Nets and text encoders, judged by diffusers' converter of original checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from converters.original_names import library_unet

from .case import Case, Made
from .diffusion import ALPHA, RANK, UNET, Weights, dotted, kohya

SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
}
SDXL: dict[str, Any] = {
    **SD15,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
}
#: The text encoders: component -> (kohya's prefix, where single files have it, tensor's name and shape).
CLIP = "text_model.encoder.layers.0.mlp.fc1"
TEXT = {
    "text_encoder": ("lora_te1", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("lora_te2", "conditioner.embedders.1.model."),
}
#: Parts of names in residual blocks and beside them.
_LAYERS = (
    "in_layers.0",
    "in_layers.2",
    "out_layers.0",
    "out_layers.3",
    "emb_layers.1",
    "skip_connection",
    "op",
    "conv",
)
_BESIDE = ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2", "input_blocks.0.0")


def original_names(library: Weights) -> dict[str, str]:
    """The original name -> diffusers' name, of each tensor."""
    ends = ("weight", "bias")
    rests = {name.partition(".attentions.")[2].partition(".")[2] for name in library if ".attentions." in name}
    rests |= {f"{layer}.{end}" for layer in _LAYERS for end in ends}
    candidates = [f"{name}.{end}" for name in _BESIDE for end in ends]
    candidates += [f"middle_block.{part}.{rest}" for part in range(3) for rest in rests]
    for kind in ("input", "output"):
        for block in range(9):
            candidates += [f"{kind}_blocks.{block}.{part}.{rest}" for part in range(3) for rest in rests]
    found = {name: made for name in candidates if (made := library_unet(name, 2)) in library}
    # A block with attention has it before its convolution.
    attends = {name.partition(".1.")[0] for name, made in found.items() if ".attentions." in str(made)}
    last = {name for name in found if ".conv." in name and name.startswith("output")}
    wrong = {name for name in last if (name.split(".")[2] == "2") != (".".join(name.split(".")[:2]) in attends)}
    return {name: str(made) for name, made in found.items() if name not in wrong}


def factors(weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors (A, B) of linear layers and convolutions."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.dim() in (2, 4):
            ones = (1,) * (tensor.dim() - 2)
            a = torch.randn(RANK, *tensor.shape[1:], generator=generator)
            b = torch.randn(tensor.shape[0], RANK, *ones, generator=generator) * 0.1
            found[name.removesuffix(".weight")] = (a, b)
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def make(folder: Path, config: dict[str, Any], trainer: str, base: str, text: bool) -> Made:
    """A LoRA of a U-Net, and of text encoders, and what they become."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**config)
    library = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in model.state_dict().items()}
    names = original_names(library)
    original = {name: library[made] for name, made in names.items()}
    judged = convert_ldm_unet_checkpoint({UNET + name: tensor for name, tensor in original.items()}, {**model.config})
    assert judged.keys() == library.keys(), sorted(judged.keys() ^ library.keys())[:3]
    assert all(torch.equal(judged[name], tensor) for name, tensor in library.items())
    low = factors(original if trainer == "kohya" else library)
    alpha = trainer != "diffusers"
    file = dotted("unet.", low) if trainer == "diffusers" else kohya("lora_unet", low)
    scale = ALPHA / RANK if alpha else 1.0
    to_library = names if trainer == "kohya" else {name: name for name in library}
    change = {to_library[f"{name}.weight"]: scale * product(*pair) for name, pair in low.items()}
    tuned = {name: tensor + change.get(name, 0) for name, tensor in library.items()}
    models = {"unet": (library, tuned, f"{UNET}", {made: name for name, made in names.items()})}
    for component, (prefix, single) in TEXT.items() if text else ():
        weight, (a, b) = torch.randn(12, 8), next(iter(factors({"x.weight": torch.zeros(12, 8)}).values()))
        file |= dotted(f"{component}.", {CLIP: (a, b)}) if trainer == "diffusers" else kohya(prefix, {CLIP: (a, b)})
        stored = {f"{CLIP}.weight": weight}
        open_clip = component == "text_encoder_2"
        there = {f"{CLIP}.weight": "transformer.resblocks.0.mlp.c_fc.weight" if open_clip else f"{CLIP}.weight"}
        models[component] = (stored, {f"{CLIP}.weight": weight + scale * b @ a}, single, there)
    save_file(file, folder / "x.safetensors")
    wanted: Weights = {}
    if base == "pipeline":
        for component, (before, after, _, _) in models.items():
            (folder / "base" / component).mkdir(parents=True)
            save_file(before, folder / "base" / component / "diffusion_pytorch_model.safetensors")
            wanted |= {f"{component}/{name}": tensor for name, tensor in after.items()}
        (folder / "base" / "model_index.json").write_text(json.dumps({name: ["diffusers", "Model"] for name in models}))
        about = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2}
        (folder / "base" / "unet" / "config.json").write_text(json.dumps(about))
        return Made(folder / "x.safetensors", folder / "base", wanted)
    single_file: Weights = {}
    for before, after, prefix, there in models.values():
        single_file |= {prefix + there[name]: tensor.clone() for name, tensor in before.items()}
        wanted |= {prefix + there[name]: tensor for name, tensor in after.items()}
    (folder / "base").mkdir()
    save_file(single_file, folder / "base" / "model.safetensors")
    return Made(folder / "x.safetensors", folder / "base" / "model.safetensors", wanted)


def cases() -> Iterator[Case]:
    """Models x names x bases."""
    by = f"diffusers {diffusers.__version__}, key tables"
    for model, config in (("Stable Diffusion 1.5", SD15), ("Stable Diffusion XL", SDXL)):
        for trainer in ("kohya", "kohya on diffusers", "diffusers"):
            for base in ("pipeline", "single file"):
                more: dict[str, Any] = {"config": config, "trainer": trainer, "base": base, "text": config is SDXL}
                yield Case(trainer, f"{model}, {base}", by, partial(make, **more))
