"""Fine-tunes with another number of tokens than their base: the tensors that the user names are stored whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import shiradelta
from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import Fit
from tests.conftest import random_tensors, read, write_model
from tests.scenes import contents

EMBED = "model.embed_tokens.weight"
pytestmark = pytest.mark.filterwarnings("ignore")


def resized(folder: Path, rows: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A fine-tune of `made`'s model with other embeddings."""
    tuned = random_tensors(torch.bfloat16, 1)
    tuned[EMBED] = torch.randn(rows, 32).to(dtype)
    return write_model(folder, tuned)


@pytest.mark.parametrize("source", ["folder", "shd"])
@pytest.mark.parametrize(("rows", "dtype"), [(67, torch.bfloat16), (60, torch.float32)])
def test_a_resized_tensor_is_stored_whole(tmp_path: Path, made: Path, rows: int, dtype: torch.dtype, source: str):
    tuned = resized(tmp_path / "tuned", rows, dtype)
    model = Path(shutil.copytree(made / "bf16", tmp_path / "model"))
    before = contents(model)
    report = shiradelta.convert(tuned, tmp_path / "d.shd", 1.0, model, "f32", whole="*embed*")
    assert any("is stored whole" in warning for warning in report.warnings)
    assert not report.skipped
    if source == "shd":
        shiradelta.convert(tmp_path / "d.shd", tmp_path / "again.shd", 1.0, model, "f32")
        (tmp_path / "again.shd").replace(tmp_path / "d.shd")
    applied = shiradelta.apply(model, tmp_path / "d.shd")
    assert any("config.json and the tokenizer" in warning for warning in applied.warnings)
    assert np.array_equal(read(model, EMBED), read(tuned, EMBED))
    shiradelta.revert(model)
    assert contents(model) == before


def test_it_is_for_that_base_only(tmp_path: Path, made: Path):
    tuned = resized(tmp_path / "tuned", 67)
    shiradelta.convert(tuned, tmp_path / "d.shd", base=made / "bf16", whole=EMBED)
    with pytest.raises(shiradelta.errors.BaseMismatchError, match="embed_tokens"):
        shiradelta.convert(tmp_path / "d.shd", tmp_path / "again.shd", base=made / "tuned_a")
    with pytest.raises(shiradelta.errors.BaseMismatchError, match="embed_tokens"):
        shiradelta.apply(made / "tuned_a", tmp_path / "d.shd", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SourceError, r"is \[67, 32\], the base's \[64, 32\]; give --whole PATTERN"),
        (
            {"whole": "*up_proj*"},
            ArgumentError,
            r"'\*up_proj\*' matches no tensor of another shape.*these are '.*embed",
        ),
        ({"whole": [EMBED, "x"]}, ArgumentError, "'x' matches no tensor"),
        ({"whole": EMBED, "skip": EMBED}, ArgumentError, "skip pattern .* matches no tensor that would otherwise"),
        ({"whole": EMBED, "fit": Fit(["a"])}, ArgumentError, "cannot be fitted"),
        ({"whole": 3}, ArgumentError, "whole is 3"),
    ],
)
def test_what_is_not_asked_for_is_refused(
    tmp_path: Path, made: Path, options: dict[str, Any], error: type[Exception], message: str
):
    tuned = resized(tmp_path / "tuned", 67)
    with pytest.raises(error, match=message):
        shiradelta.convert(tuned, tmp_path / "d.shd", base=made / "bf16", **options)
    assert not (tmp_path / "d.shd").exists()


def test_a_source_without_such_a_tensor_takes_no_pattern(tmp_path: Path, made: Path):
    with pytest.raises(ArgumentError, match="matches no tensor of another shape than the base's; leave it out"):
        shiradelta.convert(made / "tuned_a", tmp_path / "d.shd", base=made / "bf16", whole="*")


def lora(folder: Path, tie: bool, **config: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, a LoRA of it with three tokens more, and the weights that PEFT's merge gives."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tie)).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")  # PEFT looks up whether the base has as many tokens
    model.resize_token_embeddings(43)
    tuned = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **config))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder / "lora")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "base", folder / "lora", load_file(folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kept", [(), ("embed_tokens", "lm_head")])
def test_a_lora_with_new_tokens(tmp_path: Path, tie: bool, kept: tuple[str, ...]):
    """PEFT saves resized embeddings whole by itself, or as modules_to_save; tied ones both, as one."""
    base, source, merged = lora(tmp_path, tie, target_modules=["q_proj"], modules_to_save=list(kept) or None)
    if tie and kept:  # modules_to_save unties them
        with pytest.raises(SourceError, match="untie them in the base first"):
            shiradelta.convert(source, tmp_path / "d.shd", 1.0, base, "f32")
        return
    whole = ["*embed_tokens*"] if tie else ["*embed_tokens*", "*lm_head*"]
    shiradelta.convert(source, tmp_path / "d.shd", 1.0, base, "f32", whole=whole)
    shiradelta.apply(base, tmp_path / "d.shd", tmp_path / "out")
    patched = load_file(tmp_path / "out" / "model.safetensors")
    assert patched.keys() == merged.keys()
    assert all(torch.allclose(patched[name], merged[name], atol=1e-6) for name in merged)
    assert torch.equal(patched[EMBED], merged[EMBED])


def test_factors_of_a_resized_embedding_have_to_be_merged(tmp_path: Path):
    base, source, _ = lora(tmp_path, False, target_modules=["q_proj", "embed_tokens"])
    message = r"\[40, 16\]; give the base that it was trained on, or merge it there and convert the merged model"
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(source, tmp_path / "d.shd", 1.0, base, "f32", whole="*embed_tokens*")


def test_a_transposed_tensor_is_no_resized_one(tmp_path: Path, made: Path):
    tuned = random_tensors(torch.bfloat16, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned[name] = tuned[name].T.contiguous()
    save_file(tuned, tmp_path / "tuned.safetensors")
    with pytest.raises(ArgumentError, match="matches no tensor of another shape"):
        shiradelta.convert(tmp_path / "tuned.safetensors", tmp_path / "d.shd", base=made / "bf16", whole="*up_proj*")
