"""Chooses how examples become the inputs of a model: as one text, or as something for each of its two sides."""

from __future__ import annotations

from typing import Any

from torch import nn

from shiradelta.errors import SourceError
from shiradelta.text.captions import Captions
from shiradelta.text.inputs import ModelInputs, hears, is_seq2seq
from shiradelta.text.kinds import ANSWER, CAPTION, SPEECH
from shiradelta.text.read import ExampleSet
from shiradelta.text.seq2seq import Seq2SeqExamples
from shiradelta.text.sight import PictureExamples
from shiradelta.text.speech import SpeechExamples
from shiradelta.text.tokenised import TokenisedExamples


def tokenise(
    examples: ExampleSet,
    tokenizer: Any,
    model: nn.Module,
    tokens: int,
    prompt_share: float = 0.0,
    trains: bool = False,
) -> ModelInputs:
    """Tokenises examples for a model.

    Args:
        examples: the examples.
        tokenizer: the model's; or its processor, where examples have more than texts (`load_processor`).
        model: the model.
        tokens: longer texts are cut.
        prompt_share: weight of a prompt's token, where one that the model is to say has 1.
        trains: as of `TokenisedExamples`.

    Raises:
        SourceError: the model takes no examples of this kind, or the class of its inputs refuses them.
    """
    if examples.kind is SPEECH:
        return SpeechExamples(examples, tokenizer, model, tokens, prompt_share)
    if examples.kind is ANSWER:
        return PictureExamples(examples, tokenizer, model, prompt_share)
    if prompt_share and not examples.kind.has_prompts:
        keys = " and ".join(examples.kind.keys)
        raise SourceError(f"examples with {keys} have no prompts; leave the prompt share out")
    if examples.kind is CAPTION:
        return Captions(examples, tokenizer, model, tokens)
    if hears(model):
        raise SourceError(f"{type(model).__name__} hears sound; give {SPEECH.shape}")
    if is_seq2seq(model):
        return Seq2SeqExamples(examples, tokenizer, model, tokens, prompt_share)
    return TokenisedExamples(examples, tokenizer, model, tokens, prompt_share, trains)
