"""Converts adapters of every type that the installed PEFT makes, and compares them with PEFT's own merge.

Each adapter is made at run time, with random weights, for a small model; it is converted at sparsity 1 with f32 values
and applied.  A row says "exact" (to float32 rounding), or why the type is refused.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

import shiradelta
from shiradelta.util.text import brief, table

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
_PROMPT = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
#: Type -> the options of its configuration; others are made with `TARGETS`.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, **TARGETS},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BEFT": {"target_modules": ["gate_proj"]},
    "BOFT": {"boft_block_size": 4, **TARGETS},
    "C3A": {"block_size": 16, **TARGETS},
    "CARTRIDGE": _PROMPT,
    "CPT": {"task_type": "CAUSAL_LM"},
    "FOURIERFT": {"n_frequency": 20, **TARGETS},
    "IA3": {"feedforward_modules": ["down_proj"], **TARGETS},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8, **TARGETS},
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": {"oft_block_size": 4, **TARGETS},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "ROAD": {"group_size": 8, **TARGETS},
    "SHIRA": {"r": 2, **TARGETS},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, **TARGETS},
    "VERA": {"r": 4, **TARGETS},
    "WAVEFT": {"n_frequency": 20, **TARGETS},
}
#: PEFT's types, by name.
TYPES = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def small_model(tied: bool = False) -> Any:
    """A Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=40, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def save_adapter(folder: Path, model: torch.nn.Module, kind: str, **options: Any) -> Path:
    """Saves an adapter of a type, with random weights."""
    torch.manual_seed(1)
    config = TYPES[kind](**{**OPTIONS.get(kind, TARGETS), **options})
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    tuned.save_pretrained(folder)
    return folder


def merged(model: torch.nn.Module, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own merge gives."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    return dict(loaded.merge_and_unload(safe_merge=True).state_dict())


def outcome(folder: Path, model: Any, kind: str, **options: Any) -> str:
    """What becomes of an adapter: exact, wrong, or refused with the reason."""
    base = folder / "base"
    model.save_pretrained(base)
    try:
        adapter = save_adapter(folder / "adapter", model, kind, **options)
    except Exception as error:
        return f"not made: {brief(str(error), 120)}"
    try:
        shiradelta.convert(adapter, sparsity=1, base=base, values="f32")
    except shiradelta.ShiraDeltaError as error:
        return f"refused: {str(error).replace(str(adapter), '').lstrip('/: ')}"
    shiradelta.apply(base, folder / "adapter.shd")
    wanted, found = merged(model, adapter), load_file(base / "model.safetensors")
    worst = max(float((found[name] - wanted[name]).abs().max()) for name in found)
    return "exact" if worst < 1e-6 else f"WRONG by {worst:g}"


def main() -> None:
    """Prints a row a type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, rows = small_model(), []
    cases: list[tuple[str, str, dict[str, Any]]] = [(kind, kind, {}) for kind in TYPES]
    cases += [("LORA, use_dora", "LORA", {"use_dora": True}), ("LORA, use_rslora", "LORA", {"use_rslora": True})]
    for name, kind, options in cases:
        with tempfile.TemporaryDirectory() as folder:
            rows.append([name, outcome(Path(folder), model, kind, **options)])
    print(table([[f"PEFT {peft.__version__}", "outcome"], *rows], left=2))
    print(", ".join(f"{count} {what}" for what, count in Counter(row[1].partition(":")[0] for row in rows).items()))


if __name__ == "__main__":
    main()
