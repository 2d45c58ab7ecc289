"""Adapters of MLX-LM, against its own fusing; MLX runs on processors, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .case import Case, Made, weights

#: A small Llama and a small mixture of experts, as MLX-LM and transformers call them.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "head_dim": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}


def make(
    folder: Path,
    about: dict[str, Any],
    kind: str = "lora",
    keys: list[str] | None = None,
    file: str = "adapters.safetensors",
) -> Made:
    """An adapter of random factors on a random model that transformers saves, and what MLX-LM fuses."""
    import mlx.core as mx
    import transformers
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{key: value for key, value in about.items() if key != "architectures"})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    described = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**described, "rope_theta": 10000.0, **about}))
    plain, _ = load_model(folder / "base")
    before = dict(tree_flatten(plain.parameters()))
    settings = {"rank": 2, "scale": 7.5, "dropout": 0.0, **({} if keys is None else {"keys": keys})}
    adapter = folder / "adapter"
    adapter.mkdir()
    if kind == "full":
        tuned = {name: np.array(value) + 0.1 for name, value in before.items() if ".1." in name}
        mx.save_safetensors(str(adapter / file), {name: mx.array(value) for name, value in tuned.items()})
        fused: dict[str, Any] = tuned
    else:
        plain.freeze()
        linear_to_lora_layers(plain, 2, settings, use_dora=kind == "dora")
        mx.random.seed(1)
        trained = {
            name: value + mx.random.normal(value.shape) * 0.1
            for name, value in tree_flatten(plain.trainable_parameters())
        }
        plain.update(tree_unflatten(list(trained.items())))
        if file.endswith(".npz"):
            mx.savez(str(adapter / file), **trained)
        else:
            mx.save_safetensors(str(adapter / file), trained)
        merged = [(name, layer.fuse()) for name, layer in plain.named_modules() if hasattr(layer, "fuse")]
        plain.update_modules(tree_unflatten(merged))
        fused = {name: np.array(value) for name, value in tree_flatten(plain.parameters())}
    saved = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(saved))
    wanted = {}
    for name in weights(folder / "base"):
        found = experts(name, fused)
        if found is not None:
            wanted[name] = torch.from_numpy(np.array(found))
    return Made(adapter, folder / "base", wanted)


def experts(name: str, fused: dict[str, Any]) -> Any:
    """The fused weight of a name of transformers'; an expert's is in a stack."""
    before, found, after = name.partition(".experts.")
    if not found:
        return fused.get(name)
    number, _, layer = after.partition(".")
    layers = {"w1.weight": "gate_proj.weight", "w2.weight": "down_proj.weight", "w3.weight": "up_proj.weight"}
    return fused[f"{before}.switch_mlp.{layers.get(layer, layer)}"][int(number)]


def cases() -> Iterator[Case]:
    """Kinds of layers and of files."""
    from importlib.metadata import version

    rows: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "LoRA, .npz": {"file": "adapters.npz"},
        "LoRA, embeddings and head": {"keys": ["model.embed_tokens", "lm_head", "self_attn.q_proj"]},
        "LoRA, Mixtral's experts": {"about": MIXTRAL},
        "LoRA, Qwen's experts": {"about": QWEN},
        "DoRA": {"kind": "dora"},
        "DoRA, embeddings": {"kind": "dora", "keys": ["model.embed_tokens", "mlp.down_proj"]},
        "full": {"kind": "full"},
    }
    for name, options in rows.items():
        yield Case("MLX-LM", name, f"mlx-lm {version('mlx-lm')}", partial(make, **{"about": LLAMA, **options}))
