"""Models of transformers that see or hear: vision, language with vision, audio."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.architectures.experts import ROUTED, STACKED
from benchmarks.architectures.zoo import (
    DECODER,
    SIZES,
    SPECIAL,
    TEXT,
    VISION,
    VOCABULARY,
    Architecture,
    Inputs,
    add,
    image_inputs,
    text_inputs,
    tokens,
    transformer,
)


def _vision(name: str, model: str, *usual: str, size: int = 32, **options: Any) -> None:
    add(
        Architecture(
            name, "vision", transformer(model, **options), image_inputs(size), usual=usual or ("q_proj", "v_proj")
        )
    )


def _with_text(name: str, model: str, texts: bool = True, experts: tuple[str, ...] = (), **options: Any) -> None:
    """Vision with language; those that answer are fitted on texts alone, those that compare on pairs."""

    def pair() -> Inputs:
        return {**text_inputs(), **image_inputs()()}

    inputs = text_inputs if texts else pair
    add(Architecture(name, "multimodal", transformer(model, **options), inputs, experts=experts, texts=texts))


_vision("vit", "ViTForImageClassification", **VISION, num_labels=3)
_vision("beit", "BeitForImageClassification", **VISION, num_labels=3)
_vision("dinov2", "Dinov2ForImageClassification", **VISION, num_labels=3)
_vision("dinov2-swiglu", "Dinov2Model", **VISION, use_swiglu_ffn=True)
_vision(
    "swin",
    "SwinForImageClassification",
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depths=[1, 1],
    num_heads=[2, 4],
    window_size=4,
    num_labels=3,
)
_vision(
    "segformer",
    "SegformerForSemanticSegmentation",
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[16, 32],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=16,
    num_labels=3,
)
_vision("convnext", "ConvNextForImageClassification", "pwconv1", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)


def _detr() -> Any:
    from transformers import ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    model = transformer("DetrForObjectDetection", **sizes, **heads, use_timm_backbone=False, backbone_config=backbone)
    return model()


add(Architecture("detr", "vision", _detr, image_inputs(64)))
_vision(
    "sam",
    "SamModel",
    "qkv",
    size=64,
    vision_config={
        "hidden_size": 32,
        "output_channels": 16,
        "num_pos_feats": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
        "mlp_dim": 64,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    mask_decoder_config={
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
)

#: Rotary positions in three parts, of time, height and width.
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
}
CLIP: dict[str, Any] = {"text_config": {**TEXT, **SPECIAL}, "vision_config": VISION}

_with_text(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    text_config={**DECODER, "head_dim": 8},
    vision_config={**SIZES, "image_size": 28, "patch_size": 14},
    mm_tokens_per_image=4,
)
_with_text(
    "llava",
    "LlavaForConditionalGeneration",
    text_config={**DECODER, "model_type": "llama"},
    vision_config={**VISION, "model_type": "clip_vision_model"},
    image_token_index=5,
)
_with_text(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    text_config={**DECODER, "model_type": "gemma", "head_dim": 8},
    vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
    image_token_index=5,
    projection_dim=32,
)
_with_text(
    "qwen2-vl",
    "Qwen2VLForConditionalGeneration",
    text_config={**DECODER, **MROPE},
    vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2},
)
_with_text(
    "qwen2.5-vl",
    "Qwen2_5_VLForConditionalGeneration",
    text_config={**DECODER, **MROPE},
    vision_config={
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 8,
        "fullatt_block_indexes": [1],
    },
)
_with_text(
    "qwen3-vl-moe",
    "Qwen3VLMoeForConditionalGeneration",
    experts=STACKED,
    text_config={**DECODER, **MROPE, **ROUTED, "head_dim": 8},
    vision_config={
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 8,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
)
_with_text("clip", "CLIPModel", texts=False, **CLIP, projection_dim=16)
_with_text("siglip", "SiglipModel", texts=False, **CLIP)


def _sound(frames: int, channels: int) -> torch.Tensor:
    return torch.randn(1, channels, frames) if channels else torch.randn(1, frames)


add(
    Architecture(
        "whisper",
        "audio",
        transformer(
            "WhisperForConditionalGeneration",
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=VOCABULARY,
            num_mel_bins=16,
            max_source_positions=50,
            max_target_positions=64,
            decoder_start_token_id=1,
            **SPECIAL,
        ),
        lambda: {"input_features": _sound(100, 16), "decoder_input_ids": tokens()},
    )
)
for _name, _model in {"wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC"}.items():
    add(
        Architecture(
            _name,
            "audio",
            transformer(
                _model,
                **SIZES,
                vocab_size=40,
                conv_dim=(16, 16),
                conv_stride=(4, 4),
                conv_kernel=(8, 8),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            ),
            lambda: {"input_values": _sound(400, 0)},
            unwrapped=("lm_head",),  # PEFT takes it for a model's that has embeddings, and cannot save it
        )
    )
