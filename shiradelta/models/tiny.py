"""A tiny LLaMA with random weights, and a LoRA for it: what `shiradelta demo` works on, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.format.arithmetic import Array, Float32, bfloat16_bits
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.peft import CONFIG, WEIGHTS
from shiradelta.models.safetensors import Unwritten, write_tensors

#: config.json, as transformers writes it for a `LlamaForCausalLM` with 0.1 M parameters.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
RANK = 4
#: The layers that the LoRA changes.
TARGETS = ("q_proj", "v_proj")
_SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def write_model(folder: Path) -> None:
    """Writes config.json and model.safetensors (bfloat16, 0.2 MB) to a new folder; always the same bytes."""
    random = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": 0.1 * random.standard_normal((256, 64), np.float32)}
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    for layer in range(LLAMA["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(64, np.float32)
        for name, shape in _SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = 0.1 * random.standard_normal(shape, np.float32)
    _write(folder, "config.json", LLAMA, "model.safetensors", tensors, "bfloat16", bfloat16_bits)


def write_lora(folder: Path, model: str) -> None:
    """Writes a LoRA of rank 4 on queries and values, as PEFT's folder, to a new folder; always the same bytes.

    Args:
        folder: where to.
        model: what it says its base is.
    """
    random = np.random.default_rng(1)
    tensors = {}
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, (rows, columns) in _SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            if not name.endswith(TARGETS):
                continue
            tensors[f"{module}.lora_A.weight"] = 0.1 * random.standard_normal((RANK, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = 0.1 * random.standard_normal((rows, RANK), np.float32)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
    }
    _write(folder, CONFIG, about, WEIGHTS, tensors, "float32", lambda values: values)


def _write(
    folder: Path,
    config: str,
    about: Mapping[str, Any],
    weights: str,
    tensors: Mapping[str, Float32],
    dtype: str,
    bits: Callable[[Float32], Array],
) -> None:
    folder.mkdir(parents=True)
    (folder / config).write_text(json.dumps(about, indent=2) + "\n")

    def unwritten(name: str, values: Float32) -> Unwritten:
        return Unwritten(name, values.shape, DTYPE_OF_NAME[dtype], lambda: bits(values))

    with open(folder / weights, "wb") as stream:
        write_tensors(stream, [unwritten(*item) for item in tensors.items()], {"format": "pt"})
