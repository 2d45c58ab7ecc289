"""Square factors: whether their layer is stored as [out, in] or as [in, out] follows the base, as in PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTBigCodeConfig,
    GPTBigCodeForSequenceClassification,
)

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_lora, write_model

Q, C = "model.layers.0.self_attn.q_proj", "h.0.attn.c_proj"


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize(
    ("config", "model"),
    [
        (GPT2Config, GPT2ForSequenceClassification),
        (GPTBigCodeConfig, GPTBigCodeForSequenceClassification),
    ],
)
def test_as_peft_merges(tmp_path: Path, config: type, model: type, configured: bool):
    """Layers of both kinds in one model: its projections, and a square head."""
    torch.manual_seed(0)
    plain = model(config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=16, num_labels=8, pad_token_id=0))
    plain.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["attn.c_proj", "score"], fan_in_fan_out=configured, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT sets fan_in_fan_out itself
        tuned = get_peft_model(plain, lora)
    tuned.save_pretrained(tmp_path / "lora")
    about = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    about["fan_in_fan_out"] = configured
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(about))
    report = shiradelta.convert(tmp_path / "lora", None, 1.0, tmp_path / "base", "f32")
    assert len(report.tensors) == 2
    merged = tuned.merge_and_unload().state_dict()
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        for name in delta:
            torch.testing.assert_close(torch.from_numpy(delta[name].to_dense()), merged[name] - before[name])


def change_of(lora: Path, module: str) -> torch.Tensor:
    tensors = load_file(lora / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return 4 / a.shape[0] * b @ a


@pytest.mark.parametrize(
    ("module", "configured", "fc", "transposed"),
    [
        (Q, True, None, False),  # no Conv1D has its name
        (C, True, None, True),
        (C, False, None, False),
        (C, False, (16, 64), True),  # a layer nearby has its bias along the second dimension
        (C, True, (64, 16), False),
        (C, None, (64, 16), False),
    ],
)
def test_a_base_without_a_configuration(
    tmp_path: Path, module: str, configured: bool | None, fc: tuple[int, int] | None, transposed: bool
):
    lora = write_lora(tmp_path / "lora", {module: (16, 16)}, {"lora_alpha": 4, "fan_in_fan_out": configured})
    tensors = {f"{module}.weight": torch.zeros(16, 16)}
    if fc is not None:
        tensors |= {"h.0.mlp.c_fc.weight": torch.zeros(fc), "h.0.mlp.c_fc.bias": torch.zeros(64)}
    base = write_model(tmp_path / "base", tensors)
    (base / "config.json").unlink(missing_ok=True)
    report = shiradelta.convert(lora, None, 1.0, base, "f32")
    change = change_of(lora, module)
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        found = torch.from_numpy(delta[f"{module}.weight"].to_dense())
    torch.testing.assert_close(found, change.T if transposed else change)
    assert any("despite fan_in_fan_out" in warning for warning in report.warnings) == (module == Q)


def test_what_may_be_either_is_refused(tmp_path: Path):
    lora = write_lora(tmp_path / "lora", {C: (16, 16)}, {"lora_alpha": 4})
    base = write_model(tmp_path / "base", {f"{C}.weight": torch.zeros(16, 16)})
    (base / "config.json").unlink(missing_ok=True)
    with pytest.raises(SourceError, match=r"may be a Linear .* or a Conv1D .*config\.json"):
        shiradelta.convert(lora, base=base)


@pytest.mark.parametrize(("module", "configured"), [(C, True), (C, False), (C, None), (Q, True)])
def test_without_a_base_a_square_one_is_refused(tmp_path: Path, module: str, configured: bool | None):
    lora = write_lora(tmp_path / "lora", {module: (16, 16)}, {"lora_alpha": 4, "fan_in_fan_out": configured})
    with pytest.raises(SourceError, match=rf"{module}: is square.*--base MODEL"):
        shiradelta.convert(lora)


def test_attention_whose_inputs_are_packed(tmp_path: Path):
    """PEFT 0.21 adds the change of `out_proj` twice, in its forward pass and in its merge."""
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(16, 2)})
    base = write_model(tmp_path / "base", {name: tensor.clone() for name, tensor in plain.state_dict().items()})
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tuned = get_peft_model(plain, LoraConfig(r=2, target_modules=["mha"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    report = shiradelta.convert(tmp_path / "lora", None, 1.0, base, "f32")
    assert {tensor.name for tensor in report.tensors} == {"mha.in_proj_weight", "mha.out_proj.weight"}
    assert any("mha.out_proj changes by twice" in warning for warning in report.warnings)
    merged = tuned.merge_and_unload().state_dict()
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        for name in delta:
            change = torch.from_numpy(delta[name].to_dense())
            torch.testing.assert_close(change, merged[name] - before[name], atol=1e-6, rtol=1e-4)
