"""What an encoder-decoder gets of prompts and completions, and which of its rows count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MBartConfig, MBartForConditionalGeneration

from shiradelta.errors import SourceError
from shiradelta.fit.text_behaviour import LEAST_WEIGHT, TextBehaviour
from shiradelta.text.examples import training_examples
from shiradelta.text.inputs import is_seq2seq
from shiradelta.text.kinds import COMPLETION, MESSAGES, PAIRS
from shiradelta.text.read import ExampleSet, of_texts
from shiradelta.text.seq2seq import Seq2SeqExamples
from tests.fit.test_fit import build as build_other
from tests.seq2seq import build, write_tokenizer
from tests.text.test_tokenised import TEMPLATE

ROWS = ExampleSet(COMPLETION, [["w1 w2 w3", "w4 w5"], ["w6", "w7 w8 w9 w10"], ["w1 w2", "w3"]])
KINDS = ("t5", "bart")


def made(kind: str, folder: Path, examples: ExampleSet = ROWS, tokens: int = 16) -> tuple[Any, Any, Seq2SeqExamples]:
    model, tokenizer = build(kind), write_tokenizer(kind, folder)
    return model, tokenizer, Seq2SeqExamples(examples, tokenizer, model, tokens)


def loss_of_transformers(model: Any, tokenizer: Any, prompt: str, completion: str) -> tuple[torch.Tensor, int]:
    """(sum over the labels of one example by itself, their number)."""
    given = tokenizer(prompt, return_tensors="pt")
    labels = tokenizer(text_target=completion, return_tensors="pt")["input_ids"]
    found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels)
    return found.loss * labels.numel(), labels.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind: str, tmp_path: Path):
    model, tokenizer, _ = made(kind, tmp_path)
    with torch.no_grad():
        parts = [loss_of_transformers(model, tokenizer, *row) for row in ROWS.rows]
        found = training_examples(ROWS, tokenizer, model, 16).loss(model, [0, 1, 2])
    torch.testing.assert_close(found, sum(loss for loss, _ in parts) / sum(number for _, number in parts))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, tmp_path: Path):
    """Rows of a batch are those of each example by itself: of the encoder first, then of the decoder."""
    model, tokenizer, _ = made(kind, tmp_path)
    behaviour = TextBehaviour(tokenizer, ROWS, model, 16)
    with torch.no_grad():
        together = behaviour.outputs(model, [2, 0, 1])
        alone = [behaviour.outputs(model, [index]) for index in (2, 0, 1)]
    for rows, *separate in zip(together, *alone, strict=True):
        torch.testing.assert_close(rows, torch.cat(separate), atol=1e-5, rtol=1e-4)
    marks = 1 if kind == "t5" else 2
    assert [len(rows) for rows in together] == [6 + 3 * marks] * 2 + [7 + 3 * marks] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_finds_its_rows_again(kind: str, tmp_path: Path):
    model, tokenizer, _ = made(kind, tmp_path)
    behaviour = TextBehaviour(tokenizer, ROWS, model, 16)
    with torch.no_grad():
        every, some = behaviour.outputs(model, [0, 1, 2]), behaviour.outputs(model, [2, 1])
    places = [behaviour.rows(indices) for indices in ([0, 1, 2], [2, 1])]
    assert places[0] is not None
    assert places[1] is not None
    for one, other, (at, number), (again, _) in zip(every, some, *places, strict=True):
        assert sorted(at.tolist()) == list(range(number))
        kept = torch.empty_like(one)
        kept[at] = one
        torch.testing.assert_close(kept[again], other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["w1", "w1 w2 w3 w4"], ids=["other", "same length"])
def test_statistics_tell_the_sides_apart(prompt: str, tmp_path: Path):
    """By their number of rows, which is never the same."""
    examples = ExampleSet(COMPLETION, [[prompt, "w1 w2 w3 w4"], ["w5", "w6"]])
    model, tokenizer, found = made("t5", tmp_path, examples)
    behaviour = TextBehaviour(tokenizer, examples, model, 16)
    given = found.arguments([0, 1])
    read, said = given["attention_mask"], given["decoder_input_ids"]
    assert read.shape != said.shape
    weights = behaviour.token_weights([0, 1], read.numel())
    assert weights is not None
    assert weights.tolist() == read.flatten().tolist()
    weights = behaviour.token_weights([0, 1], said.numel())
    assert weights is not None
    assert weights.view(said.shape).sum(1).tolist() == [5, 2]
    assert behaviour.token_weights([0, 1], 3) is None


def test_a_completion_that_is_cut_has_no_end_that_counts(tmp_path: Path):
    model, tokenizer, found = made("bart", tmp_path, tokens=5)
    assert [tokenizer.convert_ids_to_tokens(found.row(index)[1]) for index in range(3)] == [
        ["<s>", "w4", "w5", "</s>"],
        ["<s>", "w7", "w8", "w9", "</s>"],
        ["<s>", "w3", "</s>"],
    ]
    behaviour = TextBehaviour(tokenizer, ROWS, model, 5)
    with torch.no_grad():
        assert [len(behaviour.outputs(model, [index])[-1]) for index in range(3)] == [4, 4, 3]
    weights = behaviour.token_weights([1], 5)
    assert weights is not None
    assert weights.tolist() == pytest.approx([1, 1, 1, 1, LEAST_WEIGHT])


def test_a_tokenizer_that_marks_no_end(tmp_path: Path):
    tokenizer = write_tokenizer("t5", tmp_path)
    tokenizer.backend_tokenizer.post_processor = None
    found = Seq2SeqExamples(ROWS, tokenizer, build("t5"), 16)
    assert tokenizer.convert_ids_to_tokens(found.row(0)[1]) == ["w4", "w5", "</s>"]
    assert tokenizer.convert_ids_to_tokens(found.row(0)[0]) == ["w1", "w2", "w3"]


def test_the_last_turn_of_a_conversation_is_predicted(tmp_path: Path):
    model, tokenizer = build("t5"), write_tokenizer("t5", tmp_path)
    tokenizer.chat_template = TEMPLATE.replace("assistant", "w30").replace("w50", "w31").replace("w59", "w39")
    talk = [{"role": role, "content": text} for role, text in (("user", "w1 w2"), ("assistant", "w3"))]
    examples = ExampleSet(MESSAGES, [[[*talk, *talk]]])
    tokenizer.chat_template = TEMPLATE
    found = Seq2SeqExamples(examples, tokenizer, model, 32)
    prompt, said = (tokenizer.convert_ids_to_tokens(ids) for ids in found.row(0))
    assert said == ["<unk>", "w3", "<unk>"]  # the template's marks are words that the tokenizer lacks
    assert prompt[-2:] == ["<unk>", "<unk>"]
    assert [word for word in prompt if word != "<unk>"] == ["w1", "w2", "w3", "w1", "w2"]
    with pytest.raises(SourceError, match="example 1: does not end with what the assistant says"):
        Seq2SeqExamples(ExampleSet(MESSAGES, [[[*talk, talk[0]]]]), tokenizer, model, 32)
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="no chat template"):
        Seq2SeqExamples(examples, tokenizer, model, 32)


@pytest.mark.parametrize(
    ("examples", "share", "message"),
    [
        (
            of_texts(["w1 w2"]),
            0,
            "reads one text and writes another, so examples with text do not suit it; give .*completion",
        ),
        (ExampleSet(PAIRS, [["w1", "w2"]]), 0, "so examples with anchor and positive do not suit it"),
        (ROWS, 0.5, "T5ForConditionalGeneration predicts no token of a prompt; leave the prompt share out"),
    ],
)
def test_what_it_cannot_use_is_refused(examples: ExampleSet, share: float, message: str, tmp_path: Path):
    with pytest.raises(SourceError, match=message):
        TextBehaviour(write_tokenizer("t5", tmp_path), examples, build("t5"), 16, prompt_share=share)


def test_a_decoder_without_a_start_is_refused(tmp_path: Path):
    model: Any = build("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(SourceError, match="write decoder_start_token_id into its config"):
        Seq2SeqExamples(ROWS, write_tokenizer("t5", tmp_path), model, 16)


def test_a_decoder_that_starts_with_the_last_token(tmp_path: Path):
    """mBART's starts with the language, which is a completion's last token."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 64}
    model = MBartForConditionalGeneration(MBartConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1))
    found = Seq2SeqExamples(ROWS, write_tokenizer("t5", tmp_path), model, 16)
    labels = found.row(0)[1]
    assert found.arguments([0])["decoder_input_ids"][0, : len(labels)].tolist() == [labels[-1], *labels[:-1]]
    with pytest.raises(SourceError, match="the decoder begins with the token that its text ends with"):
        found.start(0)


def test_which_models_read_one_text_and_write_another():
    assert is_seq2seq(build("t5"))
    assert is_seq2seq(build("bart"))
    assert not is_seq2seq(build_other("causal"))
    assert not is_seq2seq(build_other("encoder"))
    assert not is_seq2seq(nn.Linear(2, 2))
