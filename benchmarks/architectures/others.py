"""Models of other libraries than transformers: diffusers, sentence-transformers, timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.architectures.zoo import (
    TEXT,
    Architecture,
    Inputs,
    add,
    image_inputs,
    text_inputs,
    transformer,
    write_tokenizer,
)


def _diffuser(name: str, model: str, inputs: Callable[[], Inputs], *usual: str, **options: Any) -> None:
    def build() -> Any:
        return getattr(import_module("diffusers"), model)(**options)

    add(Architecture(name, "diffusers", build, inputs, usual=usual or ("to_q", "to_v"), needs=("diffusers",)))


def _latents(**further: tuple[int, ...]) -> Callable[[], Inputs]:
    """Latent images of 8 x 8, a time step, and what else the model takes."""

    def inputs() -> Inputs:
        made = {name: torch.randn(1, *shape) for name, shape in further.items()}
        return {"timestep": torch.ones(1), **made}

    return inputs


_diffuser(
    "unet",
    "UNet2DConditionModel",
    _latents(sample=(4, 8, 8), encoder_hidden_states=(6, 32)),
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
    attention_head_dim=4,
)
_diffuser(
    "sd3",
    "SD3Transformer2DModel",
    _latents(hidden_states=(4, 8, 8), encoder_hidden_states=(6, 32), pooled_projections=(32,)),
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=32,
    out_channels=4,
)


def _flux_inputs() -> Inputs:
    positions = {"img_ids": torch.zeros(1, 16, 3), "txt_ids": torch.zeros(1, 6, 3)}
    states = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 32)}
    return {"timestep": torch.ones(1), "pooled_projections": torch.randn(1, 32), **states, **positions}


_diffuser(
    "flux",
    "FluxTransformer2DModel",
    _flux_inputs,
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 4, 8),
)
_diffuser(
    "vae",
    "AutoencoderKL",
    lambda: {"sample": torch.randn(1, 3, 16, 16)},
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    block_out_channels=(16, 32),
    norm_num_groups=8,
    latent_channels=4,
    sample_size=16,
)


class _Part(torch.nn.Module):
    """A module of sentence-transformers: its one child has the name that it has there."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


class _Sentences(torch.nn.Sequential):
    """A SentenceTransformer with a Dense module, as far as weights and their names go."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        encoder, dense = self.get_submodule("0.auto_model"), self.get_submodule("2.linear")
        return torch.tanh(dense(encoder(input_ids)[0].mean(1)))


def _sentences(encoder: Any, dense: torch.nn.Module) -> Any:
    return _Sentences(_Part("auto_model", encoder), torch.nn.Identity(), _Part("linear", dense)).eval()


def _build_sentences() -> Any:
    return _sentences(transformer("BertModel", **TEXT)(), torch.nn.Linear(32, 16))


def _save_sentences(model: Any, folder: Path) -> None:
    """The files that sentence-transformers writes."""
    model[0].auto_model.save_pretrained(folder)
    write_tokenizer(folder)
    settings: dict[str, dict[str, Any]] = {
        "": {"max_seq_length": 64},
        "1_Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "2_Dense": {"in_features": 32, "out_features": 16, "bias": True, "activation_function": "torch.nn.Tanh"},
    }
    modules = []
    for number, (path, config) in enumerate(settings.items()):
        kind = f"sentence_transformers.models.{path.partition('_')[2] or 'Transformer'}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
        (folder / path).mkdir(exist_ok=True)
        (folder / path / ("config.json" if path else "sentence_bert_config.json")).write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(modules))
    dense = {f"linear.{name}": weight.contiguous() for name, weight in model[2].linear.state_dict().items()}
    save_file(dense, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


def _load_sentences(folder: Path, like: Any) -> Any:
    dense = torch.nn.Linear(32, 16)
    _Part("linear", dense).load_state_dict(load_file(folder / "2_Dense" / "model.safetensors"))
    return _sentences(type(like[0].auto_model).from_pretrained(folder, local_files_only=True), dense)


add(
    Architecture(
        "sentence-dense",
        "others",
        _build_sentences,
        text_inputs,
        usual=("query", "value"),
        texts=True,
        save=_save_sentences,
        load=_load_sentences,
        wrapped=lambda model: model[0].auto_model,
    )
)

TIMM = "vit_tiny_patch16_224"


def _build_timm() -> Any:
    return import_module("timm").create_model(
        TIMM, pretrained=False, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )


def _save_timm(model: Any, folder: Path) -> None:
    """The files that timm puts on the hub."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architecture": TIMM, "num_classes": 3}))


def _load_timm(folder: Path, like: Any) -> Any:
    model = _build_timm()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _image() -> Inputs:
    return {"x": image_inputs()()["pixel_values"]}


add(
    Architecture(
        "timm-vit",
        "others",
        _build_timm,
        _image,
        usual=("qkv",),
        needs=("timm",),
        save=_save_timm,
        load=_load_timm,
    )
)
