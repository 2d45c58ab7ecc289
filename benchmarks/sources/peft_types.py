"""Adapters of every type that the installed PEFT makes, against its own merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .case import Case, Made, weights

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


def small_model(tied: bool = False, bias: bool = False) -> Any:
    """A Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=4, vocab_size=40, tie_word_embeddings=tied, attention_bias=bias
    )
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


def make(folder: Path, model: Any, kind: str, **options: Any) -> Made:
    """An adapter of a type in a folder, and what PEFT merges, if it does."""
    model.save_pretrained(folder / "base")
    adapter = save_adapter(folder / "adapter", model, kind, **options)
    try:
        found = merged(model, adapter)
    except Exception:  # its types without a merge have no error in common
        found = model.state_dict()
    return Made(adapter, folder / "base", {name: found[name] for name in weights(folder / "base")})


def make_qlora(folder: Path, model: Any) -> Made:
    """A LoRA that names a quantised model as its base, for the unquantised one."""
    made = make(folder, model, "LORA")
    about = json.loads((made.source / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "unsloth/small-bnb-4bit"
    (made.source / "adapter_config.json").write_text(json.dumps(about))
    return made


def make_resized(folder: Path, model: Any, full: bool, first: bool = False, **options: Any) -> Made:
    """A model or an adapter whose embeddings have more rows than the base's; or `first` the base was resized, too."""
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    (larger if first else model).save_pretrained(folder / "base")
    if full:
        tuned = copy.deepcopy(larger)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += torch.randn_like(parameter) * 0.05
        tuned.save_pretrained(folder / "tuned")
        return Made(folder / "tuned", folder / "base", weights(folder / "tuned"), options)
    adapter = save_adapter(folder / "adapter", larger, "LORA", modules_to_save=["embed_tokens", "lm_head"])
    found = merged(larger, adapter)
    return Made(adapter, folder / "base", {name: found[name] for name in weights(folder / "base")}, options)


def cases() -> Iterator[Case]:
    """A row a type, and some of their options."""
    model, biased = small_model(), small_model(bias=True)
    for kind in TYPES:
        yield case(model, kind)
    yield case(model, "LORA", use_dora=True)
    yield case(model, "LORA", use_rslora=True)
    yield case(biased, "LORA", lora_bias=True, target_modules=["q_proj"])
    yield case(biased, "LORA", bias="all")
    yield case(biased, "BEFT", target_modules=["q_proj"])
    yield case(model, "LORA", modules_to_save=["lm_head"])
    yield case(model, "LORA", target_modules=["embed_tokens", "q_proj"])
    yield case(model, "LORA", trainable_token_indices=[1, 5])
    yield case(model, "LORA", rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5})
    yield case(model, "LORA", layer_replication=[(0, 2), (1, 2)])
    yield case(model, "LOHA", use_effective_conv2d=True)
    yield case(model, "LOKR", decompose_both=True, r=2)
    yield case(model, "SUPERTUNING", save_precomputed_indices=False)
    by = f"peft {peft.__version__}"
    yield Case("PEFT", "LORA, of a quantised base (QLoRA)", by, partial(make_qlora, model=model))
    resized = partial(make_resized, model=model)
    stored = {"whole": ["*embed_tokens*", "*lm_head*"]}
    yield Case("PEFT", "LORA, resized vocabulary", by, partial(resized, full=False))
    yield Case("PEFT", "LORA, resized vocabulary, --whole", by, partial(resized, full=False, **stored))
    by = f"transformers {transformers.__version__}"
    yield Case("transformers", "full fine-tune, base resized first", by, partial(resized, full=True, first=True))
    yield Case("transformers", "full fine-tune, resized vocabulary", by, partial(resized, full=True))
    yield Case("transformers", "full fine-tune, resized vocabulary, --whole", by, partial(resized, full=True, **stored))


def case(model: Any, kind: str, **options: Any) -> Case:
    """The row of a type."""
    name = ", ".join([kind, *options])
    return Case("PEFT", name, f"peft {peft.__version__}", partial(make, model=model, kind=kind, **options))
