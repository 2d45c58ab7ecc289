"""LoRA of diffusion transformers under the names of their trainers, on pipelines and on original checkpoints.

The models are diffusers' own, tiny.  What a LoRA gives on original names is judged by diffusers' converter of original
checkpoints: that of the merged one has to be what the pipeline becomes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor

from converters.layout_names import other_names

from .case import Case, Made

Weights = dict[str, Tensor]
UNET = "model.diffusion_model."
#: Largest rank, and what scales all LoRA here.
RANK, ALPHA = 2, 3.0


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: what it is called.
        model: diffusers' class.
        config: makes it tiny.
        converter: diffusers' function that makes its weights of an original checkpoint; "" if the names are the same.
        widths: sizes that the function has in its code -> those of the tiny model.
    """

    name: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    converter: str = ""
    widths: Mapping[int, int] = field(default_factory=dict)

    def weights(self) -> Weights:
        """diffusers' weights, random."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.config)
        return {name: torch.randn(tensor.shape) * 0.1 for name, tensor in model.state_dict().items()}

    def library(self, original: Weights) -> Weights:
        """diffusers' weights of an original checkpoint's."""
        if not self.converter:
            return dict(original)
        function = getattr(single_file_utils, self.converter)
        if self.widths:
            source = inspect.getsource(function)
            for real, tiny in self.widths.items():
                source = source.replace(str(real), str(tiny))
            there = dict(vars(single_file_utils))
            exec(compile(source, self.converter, "exec"), there)
            function = there[self.converter]
        return dict(function(dict(original)))

    def original(self, library: Weights) -> Weights:
        """The original checkpoint of diffusers' weights.

        Raises:
            AssertionError: diffusers' converter makes other weights of it.
        """
        if not self.converter:
            return dict(library)
        made: Weights = {}
        used: set[str] = set()
        for name, where in other_names({name: tuple(tensor.shape) for name, tensor in library.items()}).items():
            if ".processor." in name:
                continue
            if isinstance(where, str):
                made[name] = library[where]
                used.add(where)
                continue
            whole = torch.zeros(where.shape).numpy().reshape(-1)
            for view in where.views:
                view.weight.of(whole)[...] = view.stored.of(library[view.name].numpy().reshape(-1))
                used.add(view.name)
            made[name] = torch.from_numpy(whole).reshape(where.shape)
        made |= {name: tensor for name, tensor in library.items() if name not in used}
        again = self.library(made)
        assert again.keys() == library.keys(), sorted(again.keys() ^ library.keys())[:3]
        assert all(torch.equal(again[name], tensor) for name, tensor in library.items()), "other weights"
        return made


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
FAMILIES = (
    Family(
        "FLUX",
        "FluxTransformer2DModel",
        {**_SMALL, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        "convert_flux_transformer_checkpoint_to_diffusers",
        {3072: 32},
    ),
    Family(
        "Chroma",
        "ChromaTransformer2DModel",
        {**_SMALL, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
         "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
         "approximator_layers": 1},
        "convert_chroma_transformer_checkpoint_to_diffusers",
        {3072: 32},
    ),
    Family(
        "SD3",
        "SD3Transformer2DModel",
        {**_SMALL, "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "caption_projection_dim": 32,
         "joint_attention_dim": 24, "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 8,
         "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        {**_SMALL, "in_channels": 4, "out_channels": 4, "text_dim": 20, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
         "cross_attn_norm": True, "image_dim": 12, "added_kv_proj_dim": 32, "rope_max_seq_len": 16},
        "convert_wan_transformer_to_diffusers",
    ),
    Family(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        {**_SMALL, "in_channels": 4, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 20,
         "axes_dims_rope": (4, 4, 8)},
    ),
    Family(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {**_SMALL, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 20, "pooled_projection_dim": 12, "rope_axes_dim": (4, 4, 8)},
        "convert_hunyuan_video_transformer_to_diffusers",
        {3072: 32},
    ),
    Family(
        "FLUX.2",
        "Flux2Transformer2DModel",
        {**_SMALL, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
         "axes_dims_rope": (4, 4, 4, 4)},
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "Z-Image",
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 20, "axes_dims": [4, 4, 8], "axes_lens": [16, 16, 16]},
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 2,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 4, "axes_dim_rope": (4, 4, 8),
         "axes_lens": (8, 8, 8), "cap_feat_dim": 20},
        "convert_lumina2_to_diffusers",
        {2304: 32, 768: 16},
    ),
    Family(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        {**_SMALL, "in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 32,
         "caption_channels": 20},
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        {**_SMALL, "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
)  # fmt: skip


def modules_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The linear layers of a model."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): shape for name, shape in found.items() if len(shape) == 2}


def factors(modules: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors (A, B) of layers."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator) * 0.1)
        for name, shape in modules.items()
    }


def merged(weights: Weights, low: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Weights:
    """Weights with scale B A added."""
    return {**weights, **{f"{name}.weight": weights[f"{name}.weight"] + scale * b @ a for name, (a, b) in low.items()}}


def kohya(prefix: str, low: Mapping[str, tuple[Tensor, Tensor]]) -> Weights:
    """Underscores for dots, and alphas."""
    file: Weights = {}
    for name, (a, b) in low.items():
        module = f"{prefix}_{name.replace('.', '_')}"
        file |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": torch.tensor(ALPHA)}
    return file


def dotted(prefix: str, low: Mapping[str, tuple[Tensor, Tensor]], alpha: bool = False) -> Weights:
    """Dots, as PEFT and diffusers have them."""
    file: Weights = {}
    for name, (a, b) in low.items():
        file |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        file |= {f"{prefix}{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
    return file


#: The names that trainers give -> (the names are the original's, whether there are alphas, the file).
TRAINERS: dict[str, tuple[bool, bool, Callable[[Mapping[str, tuple[Tensor, Tensor]]], Weights]]] = {
    "kohya": (True, True, partial(kohya, "lora_unet")),
    "Comfy": (True, False, partial(dotted, "diffusion_model.")),
    "ai-toolkit": (False, False, partial(dotted, "transformer.")),
    "SimpleTuner": (False, True, partial(dotted, "transformer.", alpha=True)),
    "OneTrainer": (False, True, partial(kohya, "lora_transformer")),
}
BASES = ("pipeline", "single file", "bare file")


def make(folder: Path, family: Family, trainer: str, base: str) -> Made:
    """A LoRA of all linear layers, and what they become."""
    library = family.weights()
    original = family.original(library)
    of_original, alpha, write = TRAINERS[trainer]
    scale = ALPHA / RANK if alpha else 1.0
    low = factors(modules_of(original if of_original else library))
    save_file(write(low), folder / "x.safetensors")
    if of_original:
        after = merged(original, low, scale)
        tuned = family.library(after)
    else:
        tuned = merged(library, low, scale)
        after = family.original(tuned)
    return Made(folder / "x.safetensors", *written(folder, base, library, original, tuned, after))


def written(
    folder: Path, base: str, library: Weights, original: Weights, tuned: Weights, after: Weights
) -> tuple[Path, Weights]:
    """Writes the base; (its path, what it becomes)."""
    if base == "pipeline":
        within = folder / "base" / "transformer"
        within.mkdir(parents=True)
        save_file(library, within / "diffusion_pytorch_model.safetensors")
        (folder / "base" / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "Model"]}))
        return folder / "base", {f"transformer/{name}": tensor.contiguous() for name, tensor in tuned.items()}
    prefix = UNET if base == "single file" else ""
    file = folder / "base" / "model.safetensors"
    file.parent.mkdir()
    save_file({prefix + name: tensor for name, tensor in original.items()}, file)
    return file, {prefix + name: tensor for name, tensor in after.items()}


def cases() -> Iterator[Case]:
    """Families x trainers x bases: all for FLUX, pipelines and single files for the rest."""
    by = f"diffusers {diffusers.__version__}, key tables"
    for family in FAMILIES:
        for trainer, (of_original, _, _) in TRAINERS.items():
            for base in BASES if family.name == "FLUX" else BASES[:2]:
                main = trainer in ("kohya", "Comfy", "ai-toolkit") or family.name == "FLUX"
                if main and (family.converter or of_original):
                    yield Case(
                        trainer, f"{family.name}, {base}", by, partial(make, family=family, trainer=trainer, base=base)
                    )
