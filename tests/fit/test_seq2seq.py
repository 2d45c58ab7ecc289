"""Fits of encoder-decoders from prompts and completions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    BartForConditionalGeneration,
    BartForSequenceClassification,
    GenerationConfig,
    PegasusXConfig,
    PegasusXForConditionalGeneration,
)

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.fit.generate import generate
from shiradelta.fit.training import FitTrainer
from shiradelta.models.loading import load_tokenizer
from shiradelta.text.batches import split
from shiradelta.text.read import read_list
from shiradelta.text.seq2seq import Seq2SeqExamples
from tests.seq2seq import build, examples, write_pair

SETTINGS = Fit(examples(), batch=16, held_out=24, device="cpu", tokens=16, steps=20, relative_lr=0.3)


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair("bart", tmp_path_factory.mktemp("one"))


def fit(pair: tuple[Path, Path], out: Path, **settings: Any) -> Any:
    options = {"values": settings.pop("values", "int4"), "base": pair[0], "sparsity": 0.1}
    return shiradelta.convert(pair[1], out, fit=replace(SETTINGS, **settings), **options).fit


@pytest.mark.parametrize("method", ["refit", "train"])
def test_it_comes_closer_than_the_largest_changes(pair: tuple[Path, Path], method: str, tmp_path: Path):
    found = fit(pair, tmp_path / "a.shd", method=method)
    assert found.fitted < 0.85 * found.topk < found.topk < found.base
    assert found.measure.startswith("KL divergence")
    assert set(found.further) >= {"relative error of hidden states", "likelihood lost on the texts, nats"}
    assert found.gain.measure == "nats per token that counts"
    assert found.gain.is_own
    assert found.gain.kept.kept > found.gain.shares["topk"].kept


@pytest.mark.slow
def test_the_share_is_that_of_the_model_that_a_reader_gets(bart: tuple[Path, Path], tmp_path: Path):
    """Losses on the examples held out, computed by transformers from the folder that the file is applied to."""
    found = fit(bart, tmp_path / "a.shd", method="refit")
    shiradelta.apply(bart[0], tmp_path / "a.shd", out=tmp_path / "fitted")
    rows = [examples()[index] for index in split(120, 24, 0)[1]]
    tokenizer = load_tokenizer(bart[0])
    for state, folder in {"base": bart[0], "tuned": bart[1], "fitted": tmp_path / "fitted"}.items():
        model = BartForConditionalGeneration.from_pretrained(folder).eval()
        nats = number = 0.0
        for row in rows:
            given = tokenizer(row["prompt"], return_tensors="pt")
            labels = tokenizer(text_target=row["completion"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss = model(input_ids=given["input_ids"], labels=labels).loss
            nats, number = nats + float(loss) * labels.numel(), number + labels.numel()
        assert found.gain.losses[state] == pytest.approx(nats / number, rel=1e-3)


def test_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in examples()))
    words = [
        "convert",
        str(pair[1]),
        "--base",
        str(pair[0]),
        "--sparsity",
        "10%",
        "--fit",
        str(path),
        "--fit-batch",
        "16",
    ]
    result = CliRunner().invoke(main, [*words, "--fit-method", "refit", "-o", str(tmp_path / "a.shd")])
    assert result.exit_code == 0, result.output
    assert "the model is loaded as a whole, for it has an encoder and a decoder" in result.stderr
    assert "gain_kept" in CliRunner().invoke(main, ["info", str(tmp_path / "a.shd")]).stdout
    result = CliRunner().invoke(main, [*words, "--fit-steps", "4", "-o", str(tmp_path / "b.shd")])
    assert result.exit_code in (0, 1), result.output  # 4 steps may leave it worse than the largest changes
    assert (tmp_path / "b.shd").exists()
    result = CliRunner().invoke(main, [*words[:-4], "--fit", f"{path}:completion", "-o", str(tmp_path / "c.shd")])
    assert result.exit_code == 1
    assert 'give {"prompt": "...", "completion": "..."}' in " ".join(result.stderr.split())
    result = CliRunner().invoke(main, [*words, "--prompt-share", "0.5", "-o", str(tmp_path / "c.shd")])
    assert result.exit_code == 1
    assert "leave the prompt share out" in " ".join(result.stderr.split())
    assert not (tmp_path / "c.shd").exists()


@pytest.mark.slow
def test_as_few_weights_as_keep_the_gain(bart: tuple[Path, Path], tmp_path: Path):
    settings = replace(SETTINGS, method="refit")
    report = shiradelta.convert(bart[1], tmp_path / "a.shd", base=bart[0], target_kept=0.5, fit=settings)
    assert report.fit.gain.kept.kept >= 0.5
    assert len(report.fit.trials) > 1


@pytest.mark.slow
def test_a_new_base(bart: tuple[Path, Path], tmp_path: Path):
    shutil.copytree(bart[0], tmp_path / "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    torch.manual_seed(3)
    moved = {
        name: value + 0.02 * torch.randn_like(value) if value.dim() > 1 else value for name, value in weights.items()
    }
    save_file(moved, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    settings = replace(SETTINGS, method="refit")
    options = {"from_base": bart[0], "sparsity": 0.3, "fit": settings}
    found = shiradelta.convert(bart[1], tmp_path / "a.shd", base=tmp_path / "new", **options).fit
    assert found.fitted < found.old_delta < found.base


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(bart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", -1)
    settings = {"mask": "prune", "values": "f32"}
    whole = fit(bart, tmp_path / "whole.shd", **settings)
    step = FitTrainer.step

    def stop(self: Any, batch: list[int]) -> Any:
        if self.state.step == 12:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(FitTrainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(bart, tmp_path / "a.shd", **settings)
    monkeypatch.setattr(FitTrainer, "step", step)
    told: list[str] = []
    again = fit(bart, tmp_path / "a.shd", **settings, log=told.append)
    assert any("going on from step 12" in line for line in told)
    assert again.fitted == whole.fitted
    one, other = (shiradelta.open_delta(tmp_path / name) for name in ("whole.shd", "a.shd"))
    with one, other:
        assert one.digest == other.digest


def made(pair: tuple[Path, Path], number: int, seed: int = 0, tokens: int = 16) -> tuple[Any, Any, Any, list[Any]]:
    model, tokenizer = BartForConditionalGeneration.from_pretrained(pair[1]).eval(), load_tokenizer(pair[0])
    model.generation_config = GenerationConfig(temperature=0.01, top_k=1, do_sample=True, eos_token_id=1)
    found = Seq2SeqExamples(read_list(examples(6)), tokenizer, model, tokens)  # type: ignore[arg-type]
    return model, tokenizer, found, generate(model, tokenizer, found, [0, 3], number, 512, seed)


def test_answers_are_samples_of_the_models_own_probabilities(bart: tuple[Path, Path]):
    model, _, found, rows = made(bart, 4000)
    longest = max(len(found.row(index)[1]) for index in (0, 3))
    assert all(len(said) == longest or said[-1] == 1 for _, said in rows)
    assert all(said[0] == 2 and 1 not in said[:-1] for _, said in rows)
    for index in (0, 3):
        source = found.row(index)[0]
        first = torch.tensor([said[1] for prompt, said in rows if prompt == source])
        assert len(first) == 2000
        with torch.no_grad():
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[1, 2]])}
            wanted = model(**given).logits[0, -1].softmax(-1)
        shares = torch.bincount(first, minlength=64) / len(first)
        errors = (wanted * (1 - wanted) / len(first)).sqrt()
        assert bool(((shares - wanted).abs() < 5 * errors + 1e-3).all())


def test_a_seed_gives_the_same_answers_and_added_ones_count_in_full(bart: tuple[Path, Path]):
    _, _, found, rows = made(bart, 20)
    assert rows == made(bart, 20)[3] != made(bart, 20, seed=1)[3]
    known = [found.row(index) for index in range(6)]
    found.extend(rows)
    assert [found.row(index) for index in range(26)] == known + rows
    assert found.rows.weights(range(26)) is None


@pytest.mark.slow
def test_a_cut_example_stays_cut_beside_added_ones(bart: tuple[Path, Path]):
    _, _, found, rows = made(bart, 4, tokens=4)
    before = found.rows.weights(range(6))
    found.extend(rows)
    after = found.rows.weights(range(10))
    assert before is not None
    assert after is not None
    assert torch.equal(found.rows.weights(range(6)), before)  # type: ignore[arg-type]
    assert len(after) == len(before) + sum(len(said) for _, said in rows)


@pytest.mark.slow
def test_a_model_with_experts_answers(tmp_path: Path):
    pair = write_pair("switch", tmp_path)
    found = fit(pair, tmp_path / "a.shd", method="refit", generate=16, texts=examples(40), held_out=8, batch=16)
    assert (found.texts, found.generated) == (32, 16)
    assert found.fitted < found.topk < found.base


@pytest.mark.slow
def test_generated_answers_are_fitted_on(bart: tuple[Path, Path], tmp_path: Path):
    found = fit(bart, tmp_path / "a.shd", method="refit", generate=32, batch=32)
    assert (found.texts, found.generated) == (96, 32)
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert delta.metadata["fit_generated"] == "32"


@pytest.mark.slow
def test_a_classifier_reads_texts(bart: tuple[Path, Path], tmp_path: Path):
    torch.manual_seed(0)
    model = BartForSequenceClassification(build("bart").config)
    model.save_pretrained(tmp_path / "base")
    shutil.copy(bart[0] / "tokenizer.json", tmp_path / "base")
    shutil.copy(bart[0] / "tokenizer_config.json", tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".fc" in name and weight.dim() == 2:
                weight += 0.3 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    texts = [one["prompt"] for one in examples()]
    found = fit((tmp_path / "base", tmp_path / "tuned"), tmp_path / "a.shd", texts=texts, method="refit")
    assert found.fitted < found.topk < found.base
    assert found.gain.measure == "divergence from the fine-tune's answer"


def test_a_model_with_other_hidden_states_is_refused(bart: tuple[Path, Path], tmp_path: Path):
    """PEGASUS-X gives them in pairs."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 64}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = PegasusXForConditionalGeneration(
        PegasusXConfig(**sizes, **heads, **marks, block_size=4, num_global_tokens=2)
    )
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    shutil.copy(bart[0] / "tokenizer.json", tmp_path / "base")
    with pytest.raises(SourceError, match="prompt and completion do not run PegasusXForConditionalGeneration"):
        fit((tmp_path / "base", tmp_path / "tuned"), tmp_path / "a.shd")


def test_a_model_without_a_head_is_refused(bart: tuple[Path, Path], tmp_path: Path):
    for folder in ("base", "tuned"):
        model: Any = build("bart")
        model.model.save_pretrained(tmp_path / folder)
    shutil.copy(bart[0] / "tokenizer.json", tmp_path / "base")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight += 0.1
    model.model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        SourceError, match="BartModel predicts no next token, so examples with prompt and completion do not suit it"
    ):
        fit((tmp_path / "base", tmp_path / "tuned"), tmp_path / "a.shd")
