"""LoRA on weights that the base ties: the one tensor changes as where PEFT merges it, or as the adapter runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import shiradelta
from shiradelta.errors import SourceError

# PEFT says itself that tied weights are difficult.
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def bert() -> Any:
    return BertForMaskedLM(BertConfig(**SIZES))


def distilbert() -> Any:
    return DistilBertForMaskedLM(DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, vocab_size=40))


def whisper() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **layers, **tokens))


def make(folder: Path, build: Callable[[], Any], **config: Any) -> tuple[Any, dict[str, Tensor]]:
    """A base and a LoRA of it: (PEFT's model, the base's tensors in memory)."""
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **config))
    tuned.save_pretrained(folder / "lora")
    return tuned, before


@cache
def class_of(build: Callable[[], Any]) -> Any:
    return type(build())


def converted(folder: Path, build: Callable[[], Any]) -> tuple[shiradelta.ConversionReport, Any]:
    report = shiradelta.convert(folder / "lora", folder / "a.shd", 1.0, folder / "base", "f32")
    shiradelta.apply(folder / "base", folder / "a.shd", out=folder / "out")
    return report, class_of(build).from_pretrained(folder / "out")


@pytest.mark.parametrize(
    ("build", "output", "embedding"),
    [
        (llama, "lm_head", "embed_tokens"),
        (bert, "cls.predictions.decoder", "word_embeddings"),
        (distilbert, "vocab_projector", "word_embeddings"),
        (whisper, "proj_out", "decoder.embed_tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("both", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_shared_tensor_changes_as_peft_merges(
    tmp_path: Path, build: Callable[[], Any], output: str, embedding: str, both: bool
):
    tuned, before = make(tmp_path, build, target_modules=[output, *([embedding] if both else [])])
    merged = tuned.merge_and_unload().state_dict()
    report, model = converted(tmp_path, build)
    found = model.state_dict()
    assert sum(not torch.equal(merged[name], before[name]) for name in before) == 2
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert (len(report.tensors), report.lost) == (1, {})
    assert any(output in warning and "several layers share" in warning for warning in report.warnings)


def test_ensured_tying_adds_once_as_the_adapter_runs(tmp_path: Path):
    """PEFT gives both layers the same factors, and its merge adds them twice."""
    tuned, _ = make(tmp_path, llama, target_modules=["embed_tokens"], ensure_weight_tying=True)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        runs = tuned(tokens).logits
        report, model = converted(tmp_path, llama)
        torch.testing.assert_close(model(tokens).logits, runs, rtol=1e-4, atol=1e-5)
    assert [warning for warning in report.warnings if "is added once, as the adapter runs" in warning]


def test_ensured_tying_that_does_not_hold(tmp_path: Path):
    """PEFT has one pair of factors for both, and whichever it loads last would win."""
    make(tmp_path, llama, target_modules=["embed_tokens"], ensure_weight_tying=True)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(SourceError, match="says ensure_weight_tying, and its factors are not those of"):
        converted(tmp_path, llama)


def test_a_tied_embedding_says_that_the_output_changes(tmp_path: Path):
    tuned, _ = make(tmp_path, llama, target_modules=["embed_tokens"])
    merged = tuned.merge_and_unload().state_dict()
    report, model = converted(tmp_path, llama)
    for name, tensor in merged.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert any("embed_tokens: changes" in warning and "several layers share" in warning for warning in report.warnings)


# ------------------------------------------------------------------------- modules that are saved whole


def retrain(folder: Path, tuned: Any, module: str) -> Tensor:
    """Changes a module that is trained whole, and saves the adapter anew."""
    weight = tuned.base_model.model.get_submodule(module).modules_to_save["default"].weight
    with torch.no_grad():
        weight += 1
    tuned.save_pretrained(folder / "lora")
    return weight.detach().clone()


def test_an_untouched_output_loses_nothing(tmp_path: Path):
    make(tmp_path, llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    report, _ = converted(tmp_path, llama)
    assert (len(report.tensors), report.lost) == (1, {})


@pytest.mark.parametrize(
    ("module", "other"), [("lm_head", "model.embed_tokens.weight"), ("model.embed_tokens", "lm_head.weight")]
)
def test_one_of_the_layers_alone(tmp_path: Path, module: str, other: str):
    tuned, _ = make(tmp_path, llama, target_modules=["q_proj"], modules_to_save=[module.rpartition(".")[2]])
    retrain(tmp_path, tuned, module)
    with pytest.raises(SourceError, match=f"the base ties it to '{other}', which would change too; untie them"):
        shiradelta.convert(tmp_path / "lora", base=tmp_path / "base")
    leaf = module.rpartition(".")[2]
    report = shiradelta.convert(tmp_path / "lora", None, 1.0, tmp_path / "base", "f32", skip=f"*{leaf}*")
    assert list(report.lost.values()) == [pytest.approx(40 * 16, rel=1e-4)]


def test_both_layers_alike(tmp_path: Path):
    """PEFT keeps them so (ensure_weight_tying), and saves both."""
    modules = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    tuned, _ = make(tmp_path, llama, **modules, ensure_weight_tying=True)
    weight = retrain(tmp_path, tuned, "model.embed_tokens")
    assert any("lm_head" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    report, model = converted(tmp_path, llama)
    assert (len(report.tensors), report.lost) == (2, {})
    torch.testing.assert_close(model.state_dict()["lm_head.weight"], weight)
    torch.testing.assert_close(model.state_dict()["model.embed_tokens.weight"], weight)


def test_both_layers_of_a_base_that_stores_both(tmp_path: Path):
    """They are not tied there, whatever the configuration says."""
    tuned, before = make(tmp_path, llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    weight = retrain(tmp_path, tuned, "lm_head")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": before["lm_head.weight"]}, file, {"format": "pt"})
    shiradelta.convert(tmp_path / "lora", tmp_path / "a.shd", 1.0, tmp_path / "base", "f32")
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert len(delta) == 2
        change = torch.from_numpy(delta["lm_head.weight"].to_dense())
        torch.testing.assert_close(before["lm_head.weight"] + change, weight)


@pytest.mark.slow
@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize(
    ("rows", "tied"),
    [
        ([3, 5], True),
        ({"embed_tokens": [3, 5], "lm_head": [3, 5]}, True),
        ({"lm_head": [3, 5]}, False),
    ],
)
def test_trained_rows(tmp_path: Path, rows: Any, tied: bool, ensured: bool):
    """PEFT ties those of the output to those of the embedding, unless only the output has any."""
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": rows, "ensure_weight_tying": ensured}
    tuned, _ = make(tmp_path, llama, **settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1
    tuned.save_pretrained(tmp_path / "lora")
    if not tied:
        with pytest.raises(
            SourceError, match=r"lm_head\S*: the base ties it to 'model.embed_tokens.weight', which would"
        ):
            shiradelta.convert(tmp_path / "lora", base=tmp_path / "base")
        return
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        runs = tuned(tokens).logits
        torch.testing.assert_close(converted(tmp_path, llama)[1](tokens).logits, runs, rtol=1e-4, atol=1e-5)


def test_the_same_tensor_twice_without_a_tie_is_a_conflict(tmp_path: Path):
    make(tmp_path, llama, target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    again = {f"model.layers.0.self_attn.q_proj.{key.rpartition('q_proj.')[2]}": t.clone() for key, t in tensors.items()}
    again = {key.replace("model.layers", "layers"): tensor for key, tensor in again.items()}
    save_file({**tensors, **again}, file)
    with pytest.raises(SourceError, match=r"q_proj: (another module changes|'\S+' and '\S+' may both be)"):
        shiradelta.convert(tmp_path / "lora", base=tmp_path / "base")
