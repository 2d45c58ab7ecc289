"""Names of diffusion transformers: those of the original checkpoints, and those of diffusers.

`{}` stands for a number.  An original tensor may be several of diffusers' one below the other, or have its two halves
exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shiradelta.util.registry import Registry


class Halves(str):
    """diffusers' name of a module whose rows are the original's, the second half first.

    Only where there are two rows for each input: a shift and a scale, which diffusers has as scale and shift.
    """


#: Original name -> diffusers' name, or names.
Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class ModelLayout:
    """The row of a kind of model.

    Attributes:
        name: what it is called.
        original, library: expressions that a name in each layout matches, and in no kind of model further down.
        modules: names of modules.
        tensors: names of tensors that are no module's weight or bias in both.
        parts: other names that adapters have for a part of a tensor.
    """

    name: str
    original: str
    library: str
    modules: Names
    tensors: Mapping[str, str] = field(default_factory=dict)
    parts: Names = field(default_factory=dict)


LAYOUTS: Registry[ModelLayout] = Registry("layout")


def _under(old: str, new: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """Names with what stands before them."""

    def put(name: str) -> str:
        return type(name)(f"{new}.{name}")

    return {
        f"{old}.{key}": put(value) if isinstance(value, str) else tuple(map(put, value)) for key, value in names.items()
    }


def _tensors(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{key}": f"{new}.{value}" for key, value in names.items()}


def _qkv(path: str = "attn.", names: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(path + name for name in names)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_IN_OUT = {"in_layer": "linear_1", "out_layer": "linear_2"}
_MLP = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_QK_NORM = {"query_norm.scale": "norm_q.weight", "key_norm.scale": "norm_k.weight"}
_ADDED_NORM = {"query_norm.scale": "norm_added_q.weight", "key_norm.scale": "norm_added_k.weight"}
_DOUBLE, _BLOCK = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _SINGLE_BLOCK = "single_blocks.{}", "single_transformer_blocks.{}"

LAYOUTS.add(
    ModelLayout(
        "FLUX.2",
        r"double_stream_modulation_img\.lin\.weight",
        r"double_stream_modulation_img\.linear\.weight",
        {
            **_under("time_in", "time_guidance_embed.timestep_embedder", _IN_OUT),
            **_under("guidance_in", "time_guidance_embed.guidance_embedder", _IN_OUT),
            "txt_in": "context_embedder",
            "img_in": "x_embedder",
            **{
                f"{name}.lin": f"{name}.linear"
                for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
            },
            **_under(
                _DOUBLE,
                _BLOCK,
                {
                    "img_attn.qkv": _qkv(),
                    "txt_attn.qkv": _qkv(names=_ADDED),
                    "img_attn.proj": "attn.to_out.0",
                    "txt_attn.proj": "attn.to_add_out",
                    "img_mlp.0": "ff.linear_in",
                    "img_mlp.2": "ff.linear_out",
                    "txt_mlp.0": "ff_context.linear_in",
                    "txt_mlp.2": "ff_context.linear_out",
                },
            ),
            **_under(_SINGLE, _SINGLE_BLOCK, {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}),
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": Halves("norm_out.linear"),
        },
        {
            **_tensors(f"{_DOUBLE}.img_attn.norm", f"{_BLOCK}.attn", _QK_NORM),
            **_tensors(f"{_DOUBLE}.txt_attn.norm", f"{_BLOCK}.attn", _ADDED_NORM),
            **_tensors(f"{_SINGLE}.norm", f"{_SINGLE_BLOCK}.attn", _QK_NORM),
        },
    )
)


def _wan(block: str) -> Names:
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj"}
    attention |= {"norm_q": "norm_q", "norm_k": "norm_k", "norm_k_img": "norm_added_k"}
    return _under(
        block,
        block,
        {
            **_under("self_attn", "attn1", attention),
            **_under("cross_attn", "attn2", attention),
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
            "before_proj": "proj_in",
            "after_proj": "proj_out",
        },
    )


LAYOUTS.add(
    ModelLayout(
        "Wan",
        r"blocks\.\d+\.self_attn\.q\.weight",
        r"blocks\.\d+\.attn1\.to_q\.weight",
        {
            **_under("time_embedding", "condition_embedder.time_embedder", {"0": "linear_1", "2": "linear_2"}),
            **_under("text_embedding", "condition_embedder.text_embedder", {"0": "linear_1", "2": "linear_2"}),
            "time_projection.1": "condition_embedder.time_proj",
            **_under(
                "img_emb.proj",
                "condition_embedder.image_embedder",
                {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
            ),
            **_wan("blocks.{}"),
            **_wan("vace_blocks.{}"),
            "head.head": "proj_out",
        },
        {
            "blocks.{}.modulation": "blocks.{}.scale_shift_table",
            "vace_blocks.{}.modulation": "vace_blocks.{}.scale_shift_table",
            "head.modulation": "scale_shift_table",
        },
    )
)

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
LAYOUTS.add(
    ModelLayout(
        "HunyuanVideo",
        r"double_blocks\.\d+\.img_attn_qkv\.weight",
        r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn\.to_q\.weight",
        {
            "img_in.proj": "x_embedder.proj",
            **_under("time_in", "time_text_embed.timestep_embedder", _MLP),
            **_under("guidance_in", "time_text_embed.guidance_embedder", _MLP),
            **_under("vector_in", "time_text_embed.text_embedder", _IN_OUT),
            "txt_in.input_embedder": "context_embedder.proj_in",
            **_under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _MLP),
            **_under(
                "txt_in.c_embedder",
                "context_embedder.time_text_embed.text_embedder",
                {"linear_1": "linear_1", "linear_2": "linear_2"},
            ),
            **_under(
                _REFINER,
                "context_embedder.token_refiner.refiner_blocks.{}",
                {
                    "self_attn_qkv": _qkv(),
                    "self_attn_proj": "attn.to_out.0",
                    "adaLN_modulation.1": "norm_out.linear",
                    "mlp.fc1": "ff.net.0.proj",
                    "mlp.fc2": "ff.net.2",
                    "norm1": "norm1",
                    "norm2": "norm2",
                },
            ),
            **_under(
                _DOUBLE,
                _BLOCK,
                {
                    "img_mod.linear": "norm1.linear",
                    "txt_mod.linear": "norm1_context.linear",
                    "img_attn_qkv": _qkv(),
                    "txt_attn_qkv": _qkv(names=_ADDED),
                    "img_attn_proj": "attn.to_out.0",
                    "txt_attn_proj": "attn.to_add_out",
                    "img_attn_q_norm": "attn.norm_q",
                    "img_attn_k_norm": "attn.norm_k",
                    "txt_attn_q_norm": "attn.norm_added_q",
                    "txt_attn_k_norm": "attn.norm_added_k",
                    "img_mlp.fc1": "ff.net.0.proj",
                    "img_mlp.fc2": "ff.net.2",
                    "txt_mlp.fc1": "ff_context.net.0.proj",
                    "txt_mlp.fc2": "ff_context.net.2",
                },
            ),
            **_under(
                _SINGLE,
                _SINGLE_BLOCK,
                {
                    "modulation.linear": "norm.linear",
                    "linear1": (*_qkv(), "proj_mlp"),
                    "linear2": "proj_out",
                    "q_norm": "attn.norm_q",
                    "k_norm": "attn.norm_k",
                },
            ),
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": Halves("norm_out.linear"),
        },
    )
)


def _lumina(block: str) -> Names:
    normed = "norm1" if block.startswith("context_refiner") else "norm1.norm"
    return _under(
        block,
        block,
        {
            "attention.qkv": _qkv("attn."),
            "attention.out": "attn.to_out.0",
            "attention.q_norm": "attn.norm_q",
            "attention.k_norm": "attn.norm_k",
            **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
            "adaLN_modulation.1": "norm1.linear",
            "attention_norm1": normed,
            "attention_norm2": "norm2",
        },
    )


def _z_image(block: str) -> Names:
    renamed: Names = {"qkv": _qkv(""), "out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
    return _under(f"{block}.attention", f"{block}.attention", renamed)


_STACKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
LAYOUTS.add(
    ModelLayout(
        "Z-Image",
        r"x_pad_token",
        r"all_x_embedder\.2-1\.weight",
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            **{name: value for block in _STACKS for name, value in _z_image(block).items()},
        },
    )
)
LAYOUTS.add(
    ModelLayout(
        "Lumina 2",
        r"layers\.\d+\.attention\.qkv\.weight",
        r"time_caption_embed\.caption_embedder\.1\.weight",
        {
            **_under("cap_embedder", "time_caption_embed.caption_embedder", {"0": "0", "1": "1"}),
            **_under("t_embedder", "time_caption_embed.timestep_embedder", _MLP),
            **{name: value for block in _STACKS for name, value in _lumina(block).items()},
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
    )
)

_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
LAYOUTS.add(
    ModelLayout(
        "LTX-Video",
        r"patchify_proj\.weight",
        r"time_embed\.emb\.timestep_embedder\.linear_1\.weight",
        {
            "patchify_proj": "proj_in",
            "adaln_single.linear": "time_embed.linear",
            **_under(
                "adaln_single.emb.timestep_embedder",
                "time_embed.emb.timestep_embedder",
                {"linear_1": "linear_1", "linear_2": "linear_2"},
            ),
            **_under(f"{_BLOCK}.attn1", f"{_BLOCK}.attn1", _NORMS),
            **_under(f"{_BLOCK}.attn2", f"{_BLOCK}.attn2", _NORMS),
        },
    )
)
_MLP_OF_AURA = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_FIRST = {"attn.w1q": "attn.to_q", "attn.w1k": "attn.to_k", "attn.w1v": "attn.to_v", "attn.w1o": "attn.to_out.0"}
LAYOUTS.add(
    ModelLayout(
        "AuraFlow",
        r"double_layers\.\d+\.attn\.w1q\.weight",
        r"joint_transformer_blocks\.\d+\.attn\.to_q\.weight",
        {
            "init_x_linear": "pos_embed.proj",
            "cond_seq_linear": "context_embedder",
            **_under("t_embedder", "time_step_proj", _MLP),
            **_under(
                "double_layers.{}",
                "joint_transformer_blocks.{}",
                {
                    **_under("mlpX", "ff", _MLP_OF_AURA),
                    **_under("mlpC", "ff_context", _MLP_OF_AURA),
                    "modX.1": "norm1.linear",
                    "modC.1": "norm1_context.linear",
                    **{f"attn.w2{one}": f"attn.to_{one}" for one in "qkv"},
                    **{f"attn.w1{one}": f"attn.add_{one}_proj" for one in "qkv"},
                    "attn.w2o": "attn.to_out.0",
                    "attn.w1o": "attn.to_add_out",
                },
            ),
            **_under(
                "single_layers.{}",
                _SINGLE_BLOCK,
                {**_under("mlp", "ff", _MLP_OF_AURA), "modCX.1": "norm1.linear", **_FIRST},
            ),
            "final_linear": "proj_out",
            "modF.1": Halves("norm_out.linear"),
        },
        {"positional_encoding": "pos_embed.pos_embed"},
    )
)

LAYOUTS.add(
    ModelLayout(
        "FLUX",  # and Chroma
        r"double_blocks\.\d+\.img_attn\.qkv\.weight|single_blocks\.\d+\.norm\.query_norm\.scale",
        r"single_transformer_blocks\.\d+\.proj_mlp\.weight",
        {
            **_under("time_in", "time_text_embed.timestep_embedder", _IN_OUT),
            **_under("vector_in", "time_text_embed.text_embedder", _IN_OUT),
            **_under("guidance_in", "time_text_embed.guidance_embedder", _IN_OUT),
            **_under("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}", _IN_OUT),
            "txt_in": "context_embedder",
            "img_in": "x_embedder",
            **_under(
                _DOUBLE,
                _BLOCK,
                {
                    "img_mod.lin": "norm1.linear",
                    "txt_mod.lin": "norm1_context.linear",
                    "img_attn.qkv": _qkv(),
                    "txt_attn.qkv": _qkv(names=_ADDED),
                    "img_attn.proj": "attn.to_out.0",
                    "txt_attn.proj": "attn.to_add_out",
                    "img_mlp.0": "ff.net.0.proj",
                    "img_mlp.2": "ff.net.2",
                    "txt_mlp.0": "ff_context.net.0.proj",
                    "txt_mlp.2": "ff_context.net.2",
                },
            ),
            **_under(
                _SINGLE,
                _SINGLE_BLOCK,
                {"modulation.lin": "norm.linear", "linear1": (*_qkv(), "proj_mlp"), "linear2": "proj_out"},
            ),
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": Halves("norm_out.linear"),
        },
        {
            **_tensors(f"{_DOUBLE}.img_attn.norm", f"{_BLOCK}.attn", _QK_NORM),
            **_tensors(f"{_DOUBLE}.txt_attn.norm", f"{_BLOCK}.attn", _ADDED_NORM),
            **_tensors(f"{_SINGLE}.norm", f"{_SINGLE_BLOCK}.attn", _QK_NORM),
            "distilled_guidance_layer.norms.{}.scale": "distilled_guidance_layer.norms.{}.weight",
        },
        {
            **_under(
                f"{_DOUBLE}.processor",
                _BLOCK,
                {
                    "qkv_lora1": _qkv(),
                    "qkv_lora2": _qkv(names=_ADDED),
                    "proj_lora1": "attn.to_out.0",
                    "proj_lora2": "attn.to_add_out",
                },
            ),
            **_under(f"{_SINGLE}.processor", _SINGLE_BLOCK, {"qkv_lora": _qkv(), "proj_lora": "proj_out"}),
        },
    )
)

_JOINT = "joint_blocks.{}"
LAYOUTS.add(
    ModelLayout(
        "Stable Diffusion 3",
        r"joint_blocks\.\d+\.x_block\.attn\.qkv\.weight",
        r"pos_embed\.pos_embed",
        {
            "x_embedder.proj": "pos_embed.proj",
            **_under("t_embedder", "time_text_embed.timestep_embedder", _MLP),
            **_under("y_embedder", "time_text_embed.text_embedder", _MLP),
            **_under(
                f"{_JOINT}.x_block",
                _BLOCK,
                {
                    "attn.qkv": _qkv(),
                    "attn.proj": "attn.to_out.0",
                    "attn2.qkv": _qkv("attn2."),
                    "attn2.proj": "attn2.to_out.0",
                    "adaLN_modulation.1": "norm1.linear",
                    "mlp.fc1": "ff.net.0.proj",
                    "mlp.fc2": "ff.net.2",
                    **{f"{attn}.ln_{one}": f"{attn}.norm_{one}" for attn in ("attn", "attn2") for one in "qk"},
                },
            ),
            **_under(
                f"{_JOINT}.context_block",
                _BLOCK,
                {
                    "attn.qkv": _qkv(names=_ADDED),
                    "attn.proj": "attn.to_add_out",
                    "adaLN_modulation.1": Halves("norm1_context.linear"),
                    "mlp.fc1": "ff_context.net.0.proj",
                    "mlp.fc2": "ff_context.net.2",
                    "attn.ln_q": "attn.norm_added_q",
                    "attn.ln_k": "attn.norm_added_k",
                },
            ),
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": Halves("norm_out.linear"),
        },
        {"pos_embed": "pos_embed.pos_embed"},
    )
)
