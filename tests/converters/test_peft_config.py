"""PEFT's adapter_config.json: each key is read, ignored for a reason, or refused; the type goes with the weights."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from converters.peft_config import IGNORED, READ, REFUSED, quantised_base
from shiradelta.errors import SourceError
from tests.conftest import write_lora, write_model

CONFIGS = [peft.LoraConfig, peft.AdaLoraConfig, peft.LoHaConfig, peft.LoKrConfig, peft.ShiraConfig]
MODULE = "layer.up"
#: Part of a key -> its shape, for the weights of each type.
PARTS = {
    "LORA": {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)},
    "ADALORA": {"lora_A": (2, 8), "lora_B": (8, 2), "lora_E": (2, 1)},
    "LOHA": dict.fromkeys(("hada_w1_b", "hada_w2_b"), (2, 8)) | dict.fromkeys(("hada_w1_a", "hada_w2_a"), (8, 2)),
    "LOKR": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
    "SHIRA": {"shira_weight": (2,), "shira_indices": (2, 2)},
}


def write_adapter(folder: Path, held: str, **config: object) -> Path:
    folder.mkdir()
    weights = {f"base_model.model.{MODULE}.{part}": torch.ones(shape) for part, shape in PARTS[held].items()}
    if held == "SHIRA":
        weights[f"base_model.model.{MODULE}.shira_indices"] = torch.tensor([[0, 1], [0, 1]])
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "init_r": 2, "lora_alpha": 2, **config}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base", {f"{MODULE}.weight": torch.zeros(8, 8)})


def test_every_field_of_pefts_configurations_is_in_one_list():
    lists = [READ, REFUSED, *IGNORED.values()]
    known = [key for some in lists for key in some]
    assert len(known) == len(set(known))
    assert {field.name for config in CONFIGS for field in fields(config)} - set(known) == set()


def test_pefts_defaults_are_accepted():
    """A default that is refused would refuse every adapter."""
    for config in CONFIGS:
        assert not [field.name for field in fields(config) if field.name in REFUSED and field.default]


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}, 0.5])
def test_an_unknown_key_is_refused_by_name(tmp_path: Path, value: object):
    lora = write_adapter(tmp_path / "lora", "LORA", use_tomorrow=value)
    with pytest.raises(SourceError, match=r"sets .use_tomorrow. to .*; merge it with PEFT and convert"):
        shiradelta.convert(lora)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_is_not_set_says_nothing(tmp_path: Path, value: object):
    assert shiradelta.convert(write_adapter(tmp_path / "lora", "LORA", use_tomorrow=value)).tensors


def test_an_unknown_initialisation_may_have_changed_the_base(tmp_path: Path):
    with pytest.raises(SourceError, match="'init_lora_weights' to 'newest'"):
        shiradelta.convert(write_adapter(tmp_path / "lora", "LORA", init_lora_weights="newest"))


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_is_refused_by_name_with_a_remedy(tmp_path: Path, key: str):
    with pytest.raises(SourceError, match=f"{re.escape(REFUSED[key].partition(';')[0])};"):
        shiradelta.convert(write_adapter(tmp_path / "lora", "LORA", **{key: {"x": 1}}))


@pytest.mark.parametrize("held", PARTS)
@pytest.mark.parametrize("said", PARTS)
def test_the_type_goes_with_the_weights(tmp_path: Path, base: Path, said: str, held: str):
    adapter = write_adapter(tmp_path / "adapter", held, peft_type=said)
    if said == held:
        assert shiradelta.convert(adapter, base=base).tensors
        return
    with pytest.raises(SourceError, match=rf"says {said}, and '[^']*' is a weight of {held}; put the adapter_config"):
        shiradelta.convert(adapter, base=base)


def test_what_only_training_uses_changes_nothing(tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", "LORA", velora_config={"num_groups": 4}, monteclora_config={"x": 1})
    file = lora / "adapter_model.safetensors"
    ends = ("lora_velora_embed", "lora_monteclora_sampler.std_prior")
    save_file({**load_file(file), **{f"base_model.model.{MODULE}.{end}": torch.ones(2) for end in ends}}, file)
    report = shiradelta.convert(lora)
    assert len(report.tensors) == 1
    assert set(report.skipped.values()) == {"PEFT uses it in training only"}


@pytest.mark.parametrize("half", ["mha", "mha.base_layer.out_proj"])
def test_half_of_an_attention_is_refused(tmp_path: Path, half: str):
    """PEFT adapts both halves, and adds one of them twice: what it does with one alone is an accident."""
    mha = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(16, 2)})
    base = write_model(tmp_path / "base", {name: tensor.clone() for name, tensor in mha.state_dict().items()})
    lora = write_lora(tmp_path / "lora", {half: (48 if half == "mha" else 16, 16)}, {"lora_alpha": 4})
    with pytest.raises(SourceError, match=r"half of the change of an nn\.MultiheadAttention"):
        shiradelta.convert(lora, base=base)


@pytest.mark.parametrize("name", ["unsloth/llama-3-8b-bnb-4bit", "x/y-GPTQ", "TheBloke/m-AWQ", "a/b_int4", "c-8bit"])
def test_a_quantised_base_is_noted(name: str):
    (note,) = quantised_base({"": {"base_model_name_or_path": name}})
    assert note.startswith(f"was trained on {name}, whose weights are rounded")
    for other in ("meta-llama/Llama-3-8B", "habit/rabbit", "", None):
        assert not quantised_base({"": {"base_model_name_or_path": other}})
