"""Random weights in the shapes of real models, written as safetensors; labelled random wherever they are used."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

#: The linear layers of one Llama-2-7B block: name -> (out, in).
LLAMA_7B_LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def names(layers: int) -> dict[str, tuple[int, int]]:
    """Module -> shape."""
    return {
        f"model.layers.{layer}.{module}": shape for layer in range(layers) for module, shape in LLAMA_7B_LAYER.items()
    }


def write_base(folder: Path, layers: int, seed: int = 0) -> None:
    """A sharded bf16 checkpoint, one shard a layer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {}
        for module, shape in LLAMA_7B_LAYER.items():
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            tensors[f"model.layers.{layer}.{module}.weight"] = weight
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_lora(folder: Path, layers: int, rank: int = 16, seed: int = 1) -> None:
    """A PEFT adapter on all linear layers, float32, random factors."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in names(layers).items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.empty(rank, columns).normal_(std=0.01, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.empty(rows, rank).normal_(std=0.01, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
