"""Adapters that PEFT itself merges, against its merge of the whole model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import shiradelta
from converters.peft_config import TYPES
from shiradelta.errors import SourceError

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
#: Type -> its options; those of `QUICK` run each time.
OPTIONS: dict[str, dict[str, object]] = {
    "IA3": {"feedforward_modules": ["down_proj"], **TARGETS},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 4, **TARGETS},
    "VERA": {"r": 4, **TARGETS},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5], "target_modules": ["embed_tokens"]},
    "BOFT": {"boft_block_size": 4, **TARGETS},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, **TARGETS},
    "C3A": {"block_size": 16, **TARGETS},
    "WAVEFT": {"n_frequency": 20, **TARGETS},
    "FOURIERFT": {"n_frequency": 20, **TARGETS},
    "MISS": {"r": 8, **TARGETS},
    "ROAD": {"group_size": 8, **TARGETS},
    **dict.fromkeys(("DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "OSF", "PEANUT", "PSOFT"), TARGETS),
    **dict.fromkeys(("PVERA", "RANDLORA", "SUPERTUNING", "TINYLORA", "UNILORA"), TARGETS),
}
QUICK = ("IA3", "LN_TUNING", "OFT", "VERA", "TRAINABLE_TOKENS")
KNOWN = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def saved(folder: Path, model: torch.nn.Module, kind: str) -> Path:
    """An adapter of a type, with random weights."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(copy.deepcopy(model), KNOWN[kind](**OPTIONS[kind]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in OPTIONS]
)
def test_the_changes_are_those_of_pefts_merge(tmp_path: Path, model: transformers.LlamaForCausalLM, kind: str):
    if kind not in KNOWN:
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    base, adapter = tmp_path / "base", saved(tmp_path / "adapter", model, kind)
    model.save_pretrained(base)
    before = (base / "model.safetensors").read_bytes()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    merged = loaded.merge_and_unload(safe_merge=True).state_dict()
    shiradelta.convert(adapter, sparsity=1, base=base, values="f32")
    assert (base / "model.safetensors").read_bytes() == before
    shiradelta.apply(base, tmp_path / "adapter.shd")
    changed = 0
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7, msg=name)
        changed += not torch.equal(tensor, model.state_dict()[name])
    assert changed


def refused(folder: Path, base: Path | None, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        shiradelta.convert(folder, base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_refused_in_a_line(tmp_path: Path, model: transformers.LlamaForCausalLM):
    base, adapter = tmp_path / "base", saved(tmp_path / "adapter", model, "IA3")
    model.save_pretrained(base)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    held, about = load_file(file), json.loads(config.read_text())
    refused(adapter, None, "is of type IA3, which PEFT itself has to merge, for which it needs the base")
    first = min(held)
    for tensors, match in (
        ({key: tensor for key, tensor in held.items() if key != first}, "is lacking in the layers that PEFT"),
        ({**held, "base_model.model.elsewhere.ia3_l": torch.ones(3)}, "elsewhere.* has no place in the layers"),
        ({**held, "base_model.model.model.norm.weight": torch.ones(32)}, "norm.* has no place in the layers"),
        ({**held, first: torch.ones(3)}, "cannot load"),
        ({**held, first: torch.full_like(held[first], torch.nan)}, "NaN"),
    ):
        save_file(tensors, file)
        refused(adapter, base, match)
    save_file(held, file)
    for change, match in (
        ({"target_modules": ["elsewhere"], "feedforward_modules": []}, "cannot load"),
        ({"tomorrow": 1}, "cannot read its configuration"),
        ({"peft_type": "TOMORROW"}, "knows no type TOMORROW; upgrade peft"),
        ({"peft_type": "XLORA"}, "mixes adapters by the text; no change of weights does the same"),
        ({"n": 1 << 40}, "has a number of no adapter"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save in an adapter of type IA3"),
    ):
        config.write_text(json.dumps({**about, **change}))
        refused(adapter, base, match)
    config.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    refused(adapter, base, "trains inputs of the model and not its weights; no change of weights does the same")
    config.write_text(json.dumps(about))
    (base / "config.json").unlink()
    refused(adapter, base, "transformers cannot build its model")


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_the_base_shares_is_not_changed_for_one_layer(
    tmp_path: Path, model: transformers.LlamaForCausalLM
):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    tied = transformers.LlamaForCausalLM(config)
    adapter = saved(tmp_path / "adapter", tied, "TRAINABLE_TOKENS")
    tied.save_pretrained(tmp_path / "base")
    refused(adapter, tmp_path / "base", "the base shares 'model.embed_tokens.weight' with other layers")


def test_each_type_has_one_reader():
    assert not set(OPTIONS) & set(TYPES)
