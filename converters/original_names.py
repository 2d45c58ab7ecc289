"""Names in original checkpoints of Stable Diffusion, in one file, and those of diffusers and transformers.

U-Nets of Stable Diffusion 1, 2 and XL have numbered blocks there (`input_blocks.4.1`), text encoders of OpenCLIP
(Stable Diffusion 2, the second one of XL) the queries, keys and values of a layer in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted
from shiradelta.models.names import Shape
from shiradelta.models.views import Box, View, contiguous

#: What stands before the names of the denoising model in a checkpoint of all components.
UNET = "model.diffusion_model."
#: A component as files call it -> where checkpoints in one file have it.
SINGLE_FILE = {
    "unet": (UNET,),
    "transformer": (UNET,),
    "diffusion_model": (UNET,),
    "model.diffusion_model": (UNET,),
    "te": ("cond_stage_model.transformer.", "cond_stage_model.model."),
    "te1": ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer."),
    "te2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "te3": ("text_encoders.t5xxl.transformer.",),
}
SINGLE_FILE["text_encoder"] = (*SINGLE_FILE["te"], *SINGLE_FILE["te1"])
SINGLE_FILE["text_encoder_2"], SINGLE_FILE["text_encoder_3"] = SINGLE_FILE["te2"], SINGLE_FILE["te3"]
#: Those of OpenCLIP.
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")

_ORIGINAL = re.compile(r"(?:^|[._])(?:(?:input|output|double|single|joint)_blocks|middle_block)[._]")
_NUMBERED = re.compile(r"(?:^|[._])(?:(?:input|output)_blocks|middle_block)[._]")
_BLOCK = re.compile(r"(input|output)_blocks[._](\d+)[._](\d+)(?:[._](.+))?")
_MIDDLE = re.compile(r"middle_block[._]([012])(?:[._](.+))?")
_MIDDLE_PARTS = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
#: Beginnings of names outside of blocks.
_REST = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
#: Beginnings of names in a residual block.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
#: Beginnings of names in a text encoder of OpenCLIP.
_TEXT = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def is_original(name: str) -> bool:
    """Whether a tensor of a denoising model has its name in the original checkpoint, dots or underscores."""
    return _ORIGINAL.search(name) is not None


def is_numbered(name: str) -> bool:
    """Whether it is a U-Net's, where numbers of blocks count its layers."""
    return _NUMBERED.search(name) is not None


def is_single_file(base: Checkpoint) -> bool:
    """Whether a checkpoint has the components of a pipeline as original checkpoints do."""
    return any(name.startswith(UNET) for name in base)


def layers_per_block(base: Checkpoint, prefix: str) -> int | None:
    """Residual blocks in each block of a U-Net; None if it is none, or if that cannot be told.

    Args:
        base: a checkpoint of diffusers, or an original one.
        prefix: what stands before the U-Net's names.
    """
    names = [name.removeprefix(prefix) for name in base if name.startswith(prefix)]
    if any(map(is_original, names)):
        ends = [int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
        return min(ends) - 1 if ends else None
    config = next((base.config(name) for name in base if name.startswith(prefix)), {})
    if config:
        layers = config.get("layers_per_block", 2) if str(config.get("_class_name")).startswith("UNet2D") else None
        return layers if type(layers) is int and layers > 0 else None
    return len({match[1] for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}) or None


def library_unet(name: str, layers: int) -> str | None:
    """diffusers' name of a U-Net's tensor or module; None if the original name is another model's.

    Args:
        name: the original name, dots or underscores; of a name with underscores, the end keeps them.
        layers: residual blocks in each block.
    """
    found = _renamed(name, _REST)
    if found is not None:
        return found
    if (middle := _MIDDLE.fullmatch(name)) is not None:
        return _joined(_MIDDLE_PARTS[int(middle[1])], _resnet(middle[2]) if middle[1] != "1" else middle[2])
    block = _BLOCK.fullmatch(name)
    if block is None:
        return None
    down, part, rest = block[1] == "input", int(block[3]), block[4] or ""
    number, layer = divmod(int(block[2]) - down, layers + 1)
    where = f"{'down' if down else 'up'}_blocks.{number}"
    if down and layer == layers:
        return _joined(f"{where}.downsamplers.0.conv", rest.removeprefix("op").lstrip("._")) if part == 0 else None
    if part == 0:
        return _joined(f"{where}.resnets.{layer}", _resnet(rest))
    if not down and layer == layers and (part == 2 or rest.startswith("conv")):
        return _joined(f"{where}.upsamplers.0", rest)
    return _joined(f"{where}.attentions.{layer}", rest) if part == 1 else None


def library_names(base: Checkpoint, component: str) -> dict[str, str | Converted]:
    """diffusers' or transformers' names of a component's tensors in an original checkpoint -> where it has them."""
    found: dict[str, str | Converted] = {}
    for prefix in SINGLE_FILE.get(component, ()):
        layers = layers_per_block(base, prefix) if prefix == UNET else None
        for stored in (name for name in base if name.startswith(prefix)):
            name = stored.removeprefix(prefix)
            if prefix in _OPEN_CLIP:
                found.update(_open_clip(name, stored, base[stored].shape))
            elif layers is not None and (other := library_unet(name, layers)) is not None:
                found[other] = stored
    return found


def _open_clip(name: str, stored: str, shape: Shape) -> Iterator[tuple[str, str | Converted]]:
    """transformers' names of an OpenCLIP tensor; several if it is several of theirs."""
    if name == "text_projection" and len(shape) == 2:  # [in, out], unlike a linear layer's weight
        weight = contiguous(shape[::-1])
        view = View(stored, shape, weight, Box(shape[::-1], contiguous(shape).strides[::-1]), weight.numel)
        yield "text_projection.weight", Converted(shape[::-1], (view,))
    other = _renamed(name, _TEXT)
    if other is not None:
        yield other, stored
    layer = _RESBLOCK.fullmatch(name)
    if layer is None:
        return
    where = f"text_model.encoder.layers.{layer[1]}"
    for kind in ("weight", "bias"):
        if layer[2] == f"attn.in_proj_{kind}" and shape and shape[0] % 3 == 0:
            part = (shape[0] // 3, *shape[1:])
            box = contiguous(part)
            for number, which in enumerate("qkv"):
                view = View(stored, shape, box, Box(part, box.strides, number * box.numel), box.numel)
                yield f"{where}.self_attn.{which}_proj.{kind}", Converted(part, (view,))
    inner = _renamed(layer[2], _TEXT_LAYER)
    if inner is not None:
        yield f"{where}.{inner}", stored


def _renamed(name: str, beginnings: dict[str, str]) -> str | None:
    """The name with another beginning, which ends where a part of the name does; None if it begins with none."""
    for old, new in beginnings.items():
        pattern = re.escape(old).replace(r"\.", "[._]")
        if (match := re.fullmatch(rf"{pattern}(?:[._](.+))?", name)) is not None:
            return _joined(new, match[1])
    return None


def _joined(*parts: str | None) -> str:
    return ".".join(filter(None, parts))


def _resnet(rest: str | None) -> str:
    return _renamed(rest or "", _RESNET) or rest or ""
