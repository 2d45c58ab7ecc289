"""kohya's and diffusers' names on bases of Stable Diffusion: pipelines in folders, and original checkpoints in a file.

Names of originals are taken from the published checkpoints; a renaming is judged by what diffusers' own code does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

pytestmark = pytest.mark.slow

TEXT = "text_model.encoder.layers.0"
CLIP_G = "conditioner.embedders.1.model.transformer.resblocks.0"
Q = "attentions.0.transformer_blocks.0.attn1.to_q"

#: A U-Net's modules in an original checkpoint -> in diffusers, with two residual blocks in each block.
UNET = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": f"down_blocks.1.{Q}",
    "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.9.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.0.1.transformer_blocks.0.attn2.to_k": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.0.out_layers.3": "up_blocks.2.resnets.2.conv2",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}


def kohya(*modules: str, rows: int = 8) -> dict[str, Tensor]:
    """Factors of each module, different for each."""
    tensors = {}
    for number, module in enumerate(modules):
        generator = torch.Generator().manual_seed(number)
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, 8, generator=generator)
        tensors[f"{module}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return tensors


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]


def mangled(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def changes(source: Path, base: Path) -> dict[str, Tensor]:
    shiradelta.convert(source, source.with_suffix(".shd"), 1.0, base, "f32")
    with shiradelta.open_delta(source.with_suffix(".shd")) as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


def write_unet(folder: Path, **config: object) -> Path:
    write_model(folder / "unet", {f"{name}.weight": torch.zeros(8, 8) for name in UNET.values()})
    about = {"_class_name": "UNet2DConditionModel", **config}
    (folder / "unet" / "config.json").write_text(json.dumps(about))
    (folder / "model_index.json").write_text("{}")
    return folder


def write_single(file: Path, *more: str) -> Path:
    names = [*(f"model.diffusion_model.{name}" for name in UNET), *more]
    file.parent.mkdir(exist_ok=True)
    save_file({f"{name}.weight": torch.zeros(8, 8) for name in names}, file)
    return file


# ------------------------------------------------------------------------------------------- U-Nets


def test_original_names_on_a_pipeline(tmp_path: Path):
    tensors = kohya(*(mangled("lora_unet", name) for name in UNET))
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", write_unet(tmp_path / "base"))
    assert found.keys() == {f"unet/{name}.weight" for name in UNET.values()}
    for original, name in UNET.items():
        torch.testing.assert_close(found[f"unet/{name}.weight"], product(tensors, mangled("lora_unet", original)))


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_diffusers_names_on_a_single_file(tmp_path: Path, style: str):
    modules = {name: mangled("lora_unet", name) if style == "kohya" else f"unet.{name}" for name in UNET.values()}
    tensors = kohya(*modules.values())
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", write_single(tmp_path / "sd.safetensors"))
    assert len(found) == len(UNET)
    for original, name in UNET.items():
        torch.testing.assert_close(found[f"model.diffusion_model.{original}.weight"], product(tensors, modules[name]))


def test_the_renaming_is_diffusers_own(tmp_path: Path):
    """A whole tiny U-Net: diffusers' conversion of an original checkpoint has the same tensors under the same names."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from shiradelta.converters.original_names import layers_per_block, library_unet

    from shiradelta.models.checkpoint import open_checkpoint

    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    names = list(model.state_dict())
    inverse = dict.fromkeys(names)
    originals = [
        f"{kind}_blocks.{i}.{j}.{rest}"
        for kind in ("input", "output")
        for i in range(9)
        for j in range(3)
        for rest in _rests(names)
        if (kind, j, rest[:4]) != ("output", 1, "conv")  # these blocks have attention layers before their convolution
    ]
    originals += [f"middle_block.{j}.{rest}" for j in range(3) for rest in _rests(names)]
    originals += [
        f"{name}.{end}" for name in ("time_embed.0", "time_embed.2", "out.0", "out.2") for end in ("weight", "bias")
    ]
    originals += ["input_blocks.0.0.weight", "input_blocks.0.0.bias"]
    for original in originals:
        name = library_unet(original, 2)
        if name in inverse:
            assert inverse[name] in (None, original)
            inverse[name] = original
    assert None not in inverse.values()
    prefix = "model.diffusion_model."
    stored = {prefix + str(original): torch.full((1,), float(at)) for at, original in enumerate(inverse.values())}
    save_file(stored, tmp_path / "sd.safetensors")
    assert layers_per_block(open_checkpoint(tmp_path / "sd.safetensors"), prefix) == 2
    made = convert_ldm_unet_checkpoint(dict(stored), {**model.config})
    assert {name: int(tensor) for name, tensor in made.items()} == {name: at for at, name in enumerate(inverse)}


def _rests(names: list[str]) -> set[str]:
    """Ends of original names: those of attention layers are diffusers' own."""
    attention = {name.partition(".attentions.")[2].partition(".")[2] for name in names if ".attentions." in name}
    layers = (
        "in_layers.0",
        "in_layers.2",
        "out_layers.0",
        "out_layers.3",
        "emb_layers.1",
        "skip_connection",
        "op",
        "conv",
    )
    return attention | {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")}


@pytest.mark.parametrize("config", [{"_class_name": "FluxTransformer2DModel"}, {"layers_per_block": [1, 2]}])
def test_another_layout_is_refused(tmp_path: Path, config: dict[str, object]):
    save_file(
        kohya(mangled("lora_unet", "input_blocks.4.1.transformer_blocks.0.attn1.to_q")), tmp_path / "x.safetensors"
    )
    with pytest.raises(SourceError, match="it has the original checkpoint's name, the base has diffusers'"):
        shiradelta.convert(tmp_path / "x.safetensors", base=write_unet(tmp_path / "base", **config))


def test_another_number_of_layers(tmp_path: Path):
    """Blocks of one layer: the numbers mean other blocks."""
    save_file(kohya("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"), tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", write_unet(tmp_path / "base", layers_per_block=1))
    assert list(found) == [f"unet/down_blocks.1.{Q}.weight"]


# ------------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("stored", [TEXT, TEXT.removeprefix("text_model.")])
@pytest.mark.parametrize("wanted", [TEXT, TEXT.removeprefix("text_model.")])
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_text_encoders_of_a_pipeline(tmp_path: Path, stored: str, wanted: str, style: str):
    """transformers 5 names a part of them in some classes only."""
    base = write_unet(tmp_path / "base")
    for component in ("text_encoder", "text_encoder_2"):
        write_model(base / component, {f"{stored}.mlp.fc1.weight": torch.zeros(8, 8)})
    prefixes = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    modules = {
        component: mangled(prefix, f"{wanted}.mlp.fc1") if style == "kohya" else f"{component}.{wanted}.mlp.fc1"
        for component, prefix in prefixes.items()
    }
    tensors = kohya(*modules.values())
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", base)
    assert len(found) == 2
    for component, module in modules.items():
        torch.testing.assert_close(found[f"{component}/{stored}.mlp.fc1.weight"], product(tensors, module))


@pytest.mark.parametrize(
    ("prefix", "kohyas", "name"),
    [
        ("conditioner.embedders.1.model", "lora_te2", "text_encoder_2"),
        ("cond_stage_model.model", "lora_te", "text_encoder"),
    ],
)
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_open_clip_in_a_single_file(tmp_path: Path, prefix: str, kohyas: str, name: str, style: str):
    """Queries, keys and values are one tensor there, the projection is [in, out]."""
    layer = f"{prefix}.transformer.resblocks.0"
    shapes = {
        f"{layer}.attn.in_proj_weight": (24, 8),
        f"{layer}.attn.out_proj.weight": (8, 8),
        f"{layer}.mlp.c_fc.weight": (8, 8),
        f"{layer}.mlp.c_proj.weight": (8, 8),
        f"{prefix}.text_projection": (8, 8),
    }
    base = write_single(tmp_path / "sd.safetensors")
    save_file({**load_file(base), **{key: torch.zeros(shape) for key, shape in shapes.items()}}, base)
    inner = [f"self_attn.{which}_proj" for which in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    names = [*(f"{TEXT}.{each}" for each in inner), "text_projection"]
    modules = [mangled(kohyas, each) if style == "kohya" else f"{name}.{each}" for each in names]
    tensors = kohya(*modules)
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", base)
    q, k, v, out, fc1, fc2, projection = (product(tensors, module) for module in modules)
    wanted = [torch.cat([q, k, v]), out, fc1, fc2, projection.T]
    for key, change in zip(shapes, wanted, strict=True):
        torch.testing.assert_close(found.pop(key), change)
    assert not found


def test_a_third_of_a_fused_tensor_changes_alone(tmp_path: Path):
    base = write_single(tmp_path / "sd.safetensors")
    save_file({**load_file(base), f"{CLIP_G}.attn.in_proj_weight": torch.ones(24, 8)}, base)
    module = mangled("lora_te2", f"{TEXT}.self_attn.k_proj")
    tensors = kohya(module)
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes(tmp_path / "x.safetensors", base)[f"{CLIP_G}.attn.in_proj_weight"]
    torch.testing.assert_close(found[8:16], product(tensors, module))
    assert not found[:8].any()
    assert not found[16:].any()


def test_a_shape_that_does_not_fit_a_part(tmp_path: Path):
    base = write_single(tmp_path / "sd.safetensors")
    save_file({**load_file(base), f"{CLIP_G}.attn.in_proj_weight": torch.ones(24, 8)}, base)
    save_file(kohya(mangled("lora_te2", f"{TEXT}.self_attn.k_proj"), rows=12), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"changes a tensor of shape \[12, 8\], the model's has \[8, 8\]"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)


def test_a_name_that_two_tensors_of_a_single_file_may_have(tmp_path: Path):
    names = [f"model.diffusion_model.input_blocks.4.1.{leaf}" for leaf in ("a_b.c", "a.b_c")]
    base = write_single(tmp_path / "sd.safetensors", *names)
    save_file(kohya("lora_unet_down_blocks_1_attentions_0_a_b_c"), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"may be '\S*a\S*weight' or '\S*a\S*weight' of \S*; rename"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)
