"""Models of sentence-transformers with modules after the pooling: fits and training on texts run them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

import shiradelta
from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.models import loading
from shiradelta.models.embedder import Embedder
from shiradelta.models.sentence import ACTIVATIONS, head_of, modules_not_run
from shiradelta.text.pooling import pool
from shiradelta.train.run import run
from shiradelta.train.settings import TrainSettings
from tests.fit.test_fit import BERT, WORDS, write_tokenizer

DENSE = {"in_features": 32, "out_features": 16, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
CPU = torch.device("cpu")


def folder(
    path: Path, seed: int = 0, home: str = "", dense: dict[str, Any] | None = None, last: str = "Normalize"
) -> Path:
    """An encoder, its pooling, a dense layer, a layer norm, and a last module."""
    torch.manual_seed(seed)
    BertModel(BertConfig(**BERT)).save_pretrained(path / home)
    write_tokenizer(path / home)
    kinds = {home: "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_LayerNorm": "LayerNorm"}
    kinds[f"4_{last}"] = last
    listed = [{"path": at, "type": f"sentence_transformers.models.{kind}"} for at, kind in kinds.items()]
    (path / "modules.json").write_text(json.dumps(listed))
    settings = {"1_Pooling": {"pooling_mode": "cls"}, "2_Dense": dense or DENSE, "3_LayerNorm": {"dimension": 16}}
    for at, config in settings.items():
        (path / at).mkdir()
        (path / at / "config.json").write_text(json.dumps(config))
    linear = {"linear.weight": torch.randn(16, 32) / 4, "linear.bias": torch.randn(16)}
    if (dense or {}).get("use_residual"):
        linear["residual.weight"] = torch.randn(16, 32) / 4
    save_file(linear, path / "2_Dense" / "model.safetensors")
    save_file(
        {"norm.weight": torch.rand(16) + 0.5, "norm.bias": torch.randn(16)}, path / "3_LayerNorm" / "model.safetensors"
    )
    return path


def tune(base: Path, path: Path, part: str = "") -> Path:
    """A fine-tune of the weights in one folder, or of all."""
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(1)
    for file in (path / part).rglob("*.safetensors"):
        tensors = load_file(file)
        moved = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    return path


def texts(count: int = 60) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=6)) for _ in range(count)]


@pytest.mark.parametrize("home", ["", "0_Transformer"])
def test_an_embedding_is_that_of_sentence_transformers(tmp_path: Path, home: str):
    base = folder(tmp_path / "base", home=home)
    model = loading.load_model(base, base, [CPU], torch.float32).eval()
    assert isinstance(model, Embedder)
    names = {"0.auto_model.encoder.layer.0.output.dense.weight", "2.linear.weight", "3.norm.bias"}
    assert names <= set(dict(model.named_parameters()))
    ids, mask = torch.tensor([[1, 5, 7], [2, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    encoder = BertModel.from_pretrained(base / home).eval()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(hidden, encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
        dense, norm = (load_file(base / at / "model.safetensors") for at in ("2_Dense", "3_LayerNorm"))
        expected = torch.tanh(nn.functional.linear(hidden[:, 0], dense["linear.weight"], dense["linear.bias"]))
        expected = nn.functional.layer_norm(expected, (16,), norm["norm.weight"], norm["norm.bias"])
        found = pool(hidden, mask, "cls", model)
    torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals_are_those_of_the_settings(tmp_path: Path, activation: str):
    settings = {**DENSE, "activation_function": f"torch.nn.modules.activation.{activation}", "use_residual": True}
    base = folder(tmp_path / "base", dense=settings)
    model: Any = loading.load_model(base, base, [CPU], torch.float32)
    pooled = torch.randn(3, 32)
    weights = load_file(base / "2_Dense" / "model.safetensors")
    linear = nn.functional.linear(pooled, weights["linear.weight"], weights["linear.bias"])
    expected = getattr(nn, activation)()(linear) + pooled @ weights["residual.weight"].T
    torch.testing.assert_close(model.get_submodule("2")(pooled), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "os.system"},
        {"activation_function": "torch.nn.Module"},
        {"module_input_name": "token_embeddings"},
        {"module_output_name": "other"},
    ],
)
def test_settings_that_are_unknown_are_not_run(tmp_path: Path, change: dict[str, str]):
    base = folder(tmp_path / "base", dense={**DENSE, **change})
    assert head_of(base) == []
    assert modules_not_run(base) == ["2_Dense", "3_LayerNorm"]
    assert isinstance(loading.load_model(base, base, [CPU], torch.float32), BertModel)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["train", "refit"])
def test_a_fit_reaches_the_dense_layer(tmp_path: Path, method: str):
    """Where nothing else was tuned, the embedding alone tells that something was."""
    base = folder(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", "2_Dense")
    settings = Fit(texts(), method=method, steps=30, batch=8, tokens=16, held_out=12, device="cpu")
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.2, base, fit=settings)
    assert {tensor.name for tensor in report.tensors} == {"2_Dense/linear.weight", "2_Dense/linear.bias"}
    assert not [warning for warning in report.warnings if "not fitted" in warning or "not run" in warning]
    assert report.fit is not None
    cosine = report.fit.further["cosine of embeddings"]
    assert cosine["base"] < cosine["fitted"]
    shiradelta.apply(base, tmp_path / "a.shd")


@pytest.mark.slow
def test_a_fit_warns_of_modules_that_it_does_not_run(tmp_path: Path):
    base = folder(tmp_path / "base", last="Own")
    tuned = tune(base, tmp_path / "tuned")
    settings = Fit(texts(30), steps=3, batch=8, tokens=16, held_out=8, device="cpu")
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.2, base, fit=settings)
    assert (
        "the fit does not run 2_Dense, 3_LayerNorm, 4_Own: its distances are those of the embeddings before"
        in report.warnings
    )


def test_other_modules_in_the_fine_tune_are_refused(tmp_path: Path):
    base = folder(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    (tuned / "2_Dense" / "config.json").write_text(json.dumps({**DENSE, "activation_function": "torch.nn.ReLU"}))
    with pytest.raises(SourceError, match="its modules after the pooling are not those of"):
        loading.load_model(base, tuned, [CPU], torch.float32)


def test_pairs_train_the_dense_layer(tmp_path: Path):
    base = folder(tmp_path / "base")
    rows = [{"anchor": text, "positive": " ".join(reversed(text.split()))} for text in texts()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSettings(
        sparsity=0.1, steps=10, batch=12, relative_lr=0.4, tokens=16, targets=("2.linear", "query")
    )
    report = run(base, tmp_path / "pairs.jsonl", tmp_path / "a.shd", settings, "cpu")
    assert report.tensors == 3
    assert report.trained < report.before
    shiradelta.apply(base, tmp_path / "a.shd")
    assert shiradelta.verify(base).state == "patched"
    other = folder(tmp_path / "other", last="Own")
    with pytest.raises(
        SourceError, match="2_Dense, 3_LayerNorm, 4_Own would not be run; train the SentenceTransformer"
    ):
        run(other, tmp_path / "pairs.jsonl", tmp_path / "b.shd", settings, "cpu")
