"""Where texts are cut, how batches are padded, and whether tokens belong to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from shiradelta.errors import SourceError
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.models.loading import load_tokenizer
from shiradelta.text.examples import training_examples
from shiradelta.text.kinds import KINDS
from shiradelta.text.read import ExampleSet, of_texts
from shiradelta.text.tokens import TokenTable, check_vocabulary, padding_token, position_limit, token_limit
from shiradelta.train.run import run
from shiradelta.train.settings import TrainSettings
from tests.fit.test_fit import WORDS, write_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
LONG = " ".join(WORDS)


def roberta() -> nn.Module:
    """12 positions, numbered from 2: texts may have 10 tokens."""
    return RobertaModel(RobertaConfig(**SIZES, vocab_size=100, max_position_embeddings=12, pad_token_id=1))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, vocab_size=100, max_position_embeddings=12))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=12))


@pytest.mark.parametrize(("build", "limit"), [(roberta, 10), (bert, 12), (gpt2, 12)])
def test_texts_are_cut_where_the_positions_end(build: Any, limit: int, tmp_path: Path):
    """In fits and in training alike, and the model takes what is left."""
    model = build().eval()
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert position_limit(model) == token_limit(40, tokenizer, model) == limit
    assert token_limit(4, tokenizer, model) == 4
    fit = TextBehaviour(tokenizer, of_texts([LONG]), model, 40)
    kind = KINDS["text" if build is gpt2 else "pairs"]
    train = training_examples(ExampleSet(kind, [[LONG] * len(kind.keys)] * 2), tokenizer, model, 40)
    assert fit.lengths == [limit]
    assert train.lengths == [limit] * 2
    with torch.no_grad():
        fit.outputs(model, [0])
        train.loss(model, [0, 1])


@pytest.mark.slow
def test_training_a_model_with_offset_positions(tmp_path: Path):
    roberta().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    line = json.dumps({"anchor": LONG, "positive": "w1 w2"}) + "\n"
    (tmp_path / "pairs.jsonl").write_text(line * 12)
    settings = TrainSettings(sparsity=0.1, steps=1, batch=4, tokens=40)
    assert run(tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "a.shd", settings, "cpu").steps == 1


def test_the_models_own_padding_is_preferred(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer, model = load_tokenizer(tmp_path), roberta()
    assert (tokenizer.pad_token_id, padding_token(tokenizer, model)) == (0, 1)
    for unusable in (None, -1, 100):
        model.config.pad_token_id = unusable
        assert padding_token(tokenizer, model) == 0


def test_batches_are_padded_at_the_end():
    rows = [[5, 6], [7], [8, 9, 10]]
    table = TokenTable(rows)
    ids, there = table.padded((2, 1), 99)
    assert ids.tolist() == [[8, 9, 10], [7, 99, 99]]
    assert there.tolist() == [[True] * 3, [True, False, False]]
    assert table.lengths == [2, 1, 3]
    assert table.ends((0, 2)).tolist() == [2, 6]


def test_tokens_beyond_the_model_are_refused():
    check_vocabulary(99, gpt2())
    with pytest.raises(SourceError, match="the tokenizer gives token 100, the model has 100; they do not belong"):
        check_vocabulary(100, gpt2())
    model = gpt2()
    model.name_or_path = "models/small"
    with pytest.raises(SourceError, match=r"^models/small: the tokenizer gives token 100"):
        check_vocabulary(100, model)
