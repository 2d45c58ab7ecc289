"""What a conversion says of itself: measures against the fine-tune, in report, file and picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import DeltaError, TargetError
from shiradelta.fit import MASKS, Fit
from shiradelta.text.batches import split
from tests.fit.test_fit import texts, write_pair

pytestmark = pytest.mark.slow

PNG = b"\x89PNG"
SETTINGS = Fit(texts(), steps=5, batch=16, held_out=24, device="cpu", tokens=32)


@pytest.mark.parametrize("method", ["train", "refit"])
def test_an_encoder_tells_the_cosine_of_its_embeddings(tmp_path: Path, method: str):
    base, tuned = write_pair("encoder", tmp_path)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=replace(SETTINGS, method=method))
    shiradelta.apply(base, tmp_path / "a.shd", out=tmp_path / "patched")
    held_out = [texts()[index] for index in split(120, 24, 0)[1]]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    batch = tokenizer(held_out, padding=True, return_tensors="pt")

    def embed(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        mask = batch.attention_mask[:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1)

    wanted = embed(tuned)
    found = report.fit.further["cosine of embeddings"]
    for state, folder in (("base", base), ("fitted", tmp_path / "patched")):
        assert found[state] == pytest.approx(float(torch.cosine_similarity(embed(folder), wanted).mean()), abs=1e-4)
    assert found["base"] < found["fitted"] < 1


@pytest.mark.parametrize("method", ["train", "refit"])
def test_a_language_model_tells_divergence_error_and_agreement(tmp_path: Path, method: str):
    base, tuned = write_pair("causal", tmp_path)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=replace(SETTINGS, method=method))
    fit = report.fit
    assert fit.measure.startswith("KL divergence")
    held_out = [texts()[index] for index in split(120, 24, 0)[1]]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, tuned)]
    same = []
    for text in held_out:
        with torch.no_grad():
            answers = [model(**tokenizer(text, return_tensors="pt")).logits[0].argmax(-1) for model in models]
        same.append((answers[0] == answers[1]).float())
    assert fit.further["share of equal answers"]["base"] == pytest.approx(float(torch.cat(same).mean()), abs=0.02)
    errors = fit.further["relative error of hidden states"]
    assert errors["fitted"] < errors["base"]


def test_the_measures_are_in_the_report_the_file_and_what_is_printed(tmp_path: Path):
    base, tuned = write_pair("encoder", tmp_path)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    (tmp_path / "texts.jsonl").write_text(lines)
    arguments = ["convert", tuned, "--base", base, "--fit", tmp_path / "texts.jsonl", "-o", tmp_path / "a.shd"]
    options = ["--fit-method", "refit", "--fit-batch", "16", "--accept-worse", "--plot", tmp_path / "a.png"]
    printed = CliRunner().invoke(main, [str(word) for word in arguments + options], catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    assert "cosine of embeddings" in printed.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "a.shd")]).stdout
    assert "cosine of embeddings: 0." in shown
    assert "distance_topk: 0." in shown
    asked = CliRunner().invoke(main, [str(word) for word in [*arguments, *options, "--json"]])
    told = json.loads(asked.stdout)["fit"]
    assert set(told["further"]["cosine of embeddings"]) == {"base", "topk", "fitted"}


def test_a_conversion_without_a_fit_is_drawn(made: Path, tmp_path: Path):
    shiradelta.convert(made / "tuned_a", tmp_path / "a.shd", 0.05, made / "bf16", plot=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_plot_that_cannot_be_written_is_told_before_the_work(made: Path, tmp_path: Path):
    with pytest.raises(TargetError, match="no such folder"):
        shiradelta.convert(made / "tuned_a", tmp_path / "a.shd", base=made / "bf16", plot=tmp_path / "no" / "a.png")
    other = made / "bf16" / "config.json"
    with pytest.raises(TargetError, match="is not a PNG, so it is not replaced"):
        shiradelta.convert(made / "tuned_a", tmp_path / "a.shd", base=made / "bf16", plot=other)
    assert not (tmp_path / "a.shd").exists()


def test_masks_of_the_command_line_are_those_of_the_package():
    option = next(option for option in main.commands["convert"].params if option.name == "fit_mask")
    assert tuple(option.type.choices) == tuple(MASKS)


def test_options_of_fitting_need_texts(made: Path, tmp_path: Path):
    tuned, base = str(made / "tuned_a"), str(made / "bf16")
    for option in (["--fit-mask", "gradient"], ["--fit-steps", "3"], ["--device", "cpu"]):
        result = CliRunner().invoke(main, ["convert", tuned, "--base", base, "-o", str(tmp_path / "a.shd"), *option])
        assert result.exit_code == 2
        assert f"{option[0]} is only for fitting; give --fit TEXTS, too." in result.stderr
    with pytest.raises(DeltaError, match="finds its own mask"):
        Fit([], method="refit", mask="gradient")


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("method", ["train", "refit"])
def test_a_fitted_file_keeps_its_target_size(tmp_path: Path, scope: str, method: str):
    base, tuned = write_pair("encoder", tmp_path)
    settings = replace(SETTINGS, method=method)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", base=base, target_size="9KB", scope=scope, fit=settings)
    size = (tmp_path / "a.shd").stat().st_size
    assert size <= 9_000
    # Metadata and the padding of 13 small tensors are reckoned with as they may be at worst.
    assert size > 9_000 - 1536 - 13 * (128 if scope == "tensor" else 384)
    assert report.sparsity < 0.9
    assert np.isfinite(report.fit.fitted)
    with pytest.raises(DeltaError, match="known only once it is fitted"):
        shiradelta.convert(tuned, tmp_path / "a.shd", base=base, target_error=0.5, fit=settings)


@pytest.mark.parametrize("option", [("--fit-steps", "5"), ("--fit-relative-lr", "0.1"), ("--fit-mask", "gradient")])
def test_what_is_of_training_is_refused_in_closed_form(option: tuple[str, str]):
    arguments = ["convert", "a", "--base", "b", "--fit", "texts.jsonl", "--fit-method", "refit", *option]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert f"{option[0]} is only for training" in result.stderr


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_file_says_what_the_texts_said(share: float, tmp_path: Path):
    base, tuned = write_pair("causal", tmp_path)
    fit = Fit(texts(), steps=4, batch=8, tokens=16, text_share=share)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=fit)
    assert report.fit is not None
    assert 0 <= report.fit.text_share <= share
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert ("fit_text_share" in delta.metadata) is (report.fit.text_share > 0)
        assert "base" in delta.metadata["likelihood lost on the texts, nats"]
