"""Losses of a language model's examples, on what it is to say and on the prompt alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.examples import Predicted, training_examples
from shiradelta.text.inputs import is_seq2seq
from shiradelta.text.read import of_texts, read_list
from shiradelta.text.tokenised import TokenisedExamples
from shiradelta.train.gradients import Loss
from shiradelta.util.text import brief

#: The longest text in tokens, by default.
TOKENS = 512


def text_loss(tokenizer: Any, tokens: int = TOKENS) -> Loss:
    """A loss for `train_family`: cross entropy of what a causal language model is to say.

    Args:
        tokenizer: the model's.
        tokens: longer examples are cut.

    Returns:
        loss(model, examples): examples as a file for `shiradelta train` has them (docs/fit.md), of one kind.
    """

    def loss(model: nn.Module, examples: Sequence[Any]) -> Tensor:
        found = read_list(examples)
        if found is None:
            raise SourceError("examples are neither texts nor objects; give texts, or prompts with completions")
        return training_examples(found, tokenizer, model, tokens).loss(model, range(len(examples)))

    return loss


def prompt_loss(tokenizer: Any, tokens: int = TOKENS) -> Loss:
    """A loss for routes: cross entropy of a prompt's own tokens, each after those before it.

    Args:
        tokenizer: the model's.
        tokens: longer prompts are cut.

    Returns:
        loss(model, prompts): prompts are texts, or objects with a `prompt`, whose other keys are not looked at.
    """

    def loss(model: nn.Module, prompts: Sequence[Any]) -> Tensor:
        check_predicts_prompts(model)
        texts = [_prompt(one) for one in prompts]
        found = TokenisedExamples(of_texts(texts), tokenizer, model, tokens)
        for text, length in zip(texts, found.lengths, strict=True):
            if length < 2:
                remedy = "a longer prompt" if tokens > 1 else "2 tokens or more"
                raise SourceError(
                    f"prompt {brief(repr(text), 60)} has nothing to predict, with one token; give {remedy}"
                )
        return Predicted(found).loss(model, range(len(texts)))

    return loss


def check_predicts_prompts(model: nn.Module) -> None:
    """Raises SourceError for an encoder-decoder, whose prompts have no loss to be routed by."""
    if is_seq2seq(model):
        raise SourceError(
            f"{type(model).__name__} is an encoder-decoder, which predicts no prompts, so that none can be routed;"
            " give a causal language model"
        )


def _prompt(example: Any) -> str:
    text = example.get("prompt") if isinstance(example, Mapping) else example
    if not isinstance(text, str):
        raise SourceError("an example has no prompt to route by; give a text, or an object with prompt")
    return text
