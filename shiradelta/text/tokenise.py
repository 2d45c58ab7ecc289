"""Chooses how examples become the inputs of a model: as one text, or as one for its encoder and one for its decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from shiradelta.text.inputs import ModelInputs, is_seq2seq
from shiradelta.text.read import ExampleSet
from shiradelta.text.seq2seq import Seq2SeqExamples
from shiradelta.text.tokenised import TokenisedExamples


def tokenise(
    examples: ExampleSet,
    tokenizer: Any,
    model: nn.Module,
    tokens: int,
    prompt_share: float = 0.0,
    trains: bool = False,
) -> ModelInputs:
    """Tokenises examples for a model; arguments and errors are those of `TokenisedExamples` and `Seq2SeqExamples`."""
    if is_seq2seq(model):
        return Seq2SeqExamples(examples, tokenizer, model, tokens, prompt_share)
    return TokenisedExamples(examples, tokenizer, model, tokens, prompt_share, trains)
