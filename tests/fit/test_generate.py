"""Texts that the fine-tune generates itself, where examples are few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import Fit
from shiradelta.fit.generate import generate
from shiradelta.text.read import read_list
from shiradelta.text.tokenised import TokenisedExamples
from tests.fit.test_fit import texts, write_pair
from tests.fit.test_gain import EXAMPLES, write_trained
from tests.text.test_tokenised import TEMPLATE

CHATS = [
    {"messages": [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}]}
    for one in EXAMPLES
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_trained(tmp_path_factory.mktemp("generate"))


def tokenised(folder: Path, examples: Any, prompt_share: float = 0.0, tokens: int = 16) -> tuple[Any, Any, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, tokenizer, TokenisedExamples(read_list(examples), tokenizer, model, tokens, prompt_share)


def fit(tuned: tuple[Path, Path], out: Path, examples: Any, number: int, **settings: Any) -> Any:
    settings = {"method": "refit", "batch": 16, "held_out": 20, "device": "cpu", "tokens": 32, **settings}
    return shiradelta.convert(tuned[1], out, 0.1, tuned[0], fit=Fit(examples, generate=number, **settings))


@pytest.mark.parametrize("examples", [EXAMPLES, CHATS, texts()], ids=["completions", "conversations", "texts"])
def test_texts_go_on_from_prompts_of_the_given_examples(tuned: tuple[Path, Path], examples: Any):
    model, tokenizer, found = tokenised(tuned[0], examples)
    indices = [7, 3, 11]
    made = generate(model, tokenizer, found, indices, 40, 16, seed=0)
    assert len(made) == 40
    rows = [found.row(index) for index in range(len(examples))]
    longest = max(len(rows[index][0]) - rows[index][1] for index in indices)
    prompts = [rows[index][0][: rows[index][1]] or [1] for index in indices]  # 1 is the model's start token
    assert {tuple(ids[:prompt]) for ids, prompt in made} == set(map(tuple, prompts))
    end = model.generation_config.eos_token_id
    for ids, prompt in made:
        assert 0 < len(ids) - prompt <= longest
        assert end not in ids[prompt:-1]
        assert len(ids) - prompt == longest or len(ids) == 16 or ids[-1] == end


def test_samples_are_of_the_models_own_probabilities(tuned: tuple[Path, Path]):
    """Whatever the folder's settings of generation are, and how prompts of several lengths are padded."""
    model, tokenizer, found = tokenised(tuned[0], EXAMPLES[:2])
    model.generation_config = GenerationConfig(temperature=0.01, top_k=1, do_sample=True, eos_token_id=2)
    before, state = model.generation_config, torch.get_rng_state()
    made = generate(model, tokenizer, found, [0, 1], 4000, 4000, seed=0)
    assert model.generation_config is before
    assert torch.equal(torch.get_rng_state(), state)
    for index in (0, 1):
        ids, prompt = found.row(index)
        first = torch.tensor([own[prompt] for own, length in made if own[:length] == ids[:prompt]])
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids[:prompt]])).logits[0, -1].softmax(-1)
        shares = torch.bincount(first, minlength=64) / len(first)
        errors = (wanted * (1 - wanted) / len(first)).sqrt()
        assert bool(((shares - wanted).abs() < 5 * errors + 1e-3).all())


def test_a_seed_gives_the_same_texts_again(tuned: tuple[Path, Path]):
    model, tokenizer, found = tokenised(tuned[0], EXAMPLES)
    one, same, other = (generate(model, tokenizer, found, [0, 1, 2], 20, 8, seed) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_added_texts_count_as_the_examples_do(tuned: tuple[Path, Path], share: float):
    found = tokenised(tuned[0], EXAMPLES[:3], share)[2]
    rows, lengths = [found.row(index) for index in range(3)], found.lengths
    found.extend(rows)
    assert [found.row(index) for index in range(6)] == rows + rows
    assert found.lengths == lengths + lengths
    assert (found.weights is None) == (share == 1)
    if found.weights is not None:
        first, second = found.weights.chunk(2)
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"method": "refit"}, {"method": "train", "steps": 4}], ids=["refit", "train"])
@pytest.mark.parametrize("examples", [EXAMPLES, texts()], ids=["completions", "texts"])
def test_they_are_counted_apart_and_never_held_out(
    tuned: tuple[Path, Path], tmp_path: Path, examples: Any, settings: dict[str, Any]
):
    plain, more = (fit(tuned, tmp_path / f"{n}.shd", examples, n, batch=50, **settings).fit for n in (0, 50))
    assert (plain.texts, plain.generated) == (100, 0)
    assert (more.texts, more.generated) == (100, 50)
    assert more.held_out == plain.held_out == 20
    for state in ("base", "tuned", "topk"):  # these see the examples held out alone
        assert more.gain.losses[state] == pytest.approx(plain.gain.losses[state], rel=1e-6)
    with shiradelta.open_delta(tmp_path / "50.shd") as found:
        assert found.metadata["fit_generated"] == "50"
    with shiradelta.open_delta(tmp_path / "0.shd") as found:
        assert "fit_generated" not in found.metadata


@pytest.mark.slow
def test_few_examples_are_not_enough_and_generated_ones_help(tuned: tuple[Path, Path], tmp_path: Path):
    few, more = (fit(tuned, tmp_path / f"{n}.shd", EXAMPLES[:30], n, held_out=6).fit for n in (0, 480))
    assert more.fitted < 0.9 * few.fitted


def test_from_the_command_line(tuned: tuple[Path, Path], tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES[:40]))
    words = ["convert", str(tuned[1]), "--base", str(tuned[0]), "--fit", str(path), "--fit-generate", "32", "-o"]
    result = CliRunner().invoke(main, [*words, str(tmp_path / "a.shd"), "--fit-method", "refit", "--fit-batch", "8"])
    assert result.exit_code == 0, result.output
    assert "the model is loaded as a whole, for it generates texts" in result.stderr
    assert "fitted on 32 examples and 32 generated in" in result.stdout
    assert "fit_generated: 32" in CliRunner().invoke(main, ["info", str(tmp_path / "a.shd")]).stdout


def test_what_cannot_generate_is_refused(tuned: tuple[Path, Path], tmp_path: Path):
    encoder = write_pair("encoder", tmp_path)
    with pytest.raises(SourceError, match="BertModel is no language model and generates no texts"):
        fit(encoder, tmp_path / "out.shd", texts(), 5)
    with pytest.raises(ArgumentError, match="generate is -1"):
        Fit(["a"], generate=-1)
    with pytest.raises(ArgumentError, match="leave generate or forward out"):
        Fit(["a"], generate=1, forward=lambda model, examples: None)
    model, tokenizer, found = tokenised(tuned[0], texts())
    model.config.bos_token_id = None
    with pytest.raises(SourceError, match="neither the tokenizer nor the model has a start token"):
        generate(model, tokenizer, found, [0], 1, 1, 0)
