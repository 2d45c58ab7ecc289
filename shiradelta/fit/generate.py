"""Texts that a fine-tuned language model generates itself, for a fit that has few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shiradelta.errors import SourceError
from shiradelta.models.loading import quiet
from shiradelta.text.tokenised import TokenisedExamples
from shiradelta.text.tokens import vocabulary


def generate(
    model: nn.Module,
    tokenizer: Any,
    examples: TokenisedExamples,
    indices: Sequence[int],
    number: int,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[list[int], int]]:
    """Samples texts from what a model predicts, without a change of its probabilities.

    Texts are at most as long as the longest of the examples: what the model is to say of these, and the whole.

    Args:
        model: a language model of transformers.
        tokenizer: the model's.
        examples: the examples whose prompts are continued; texts that have none are begun by the start token.
        indices: the examples to take prompts from, one after the other and again from the first.
        number: texts to generate.
        batch: texts at a time.
        seed: of the samples.
        progress: called with (texts generated, number of texts).

    Returns:
        (token ids of a text, its end included, how many of these are the prompt) for each text.

    Raises:
        SourceError: there are no prompts, and neither the tokenizer nor the model has a start token.
    """
    import transformers

    rows = [examples.row(index) for index in indices]
    longest = max(len(ids) - prompt for ids, prompt in rows)
    prompts = [ids[:prompt] or [_start(model, tokenizer)] for ids, prompt in rows]
    taken = sorted((prompts[i % len(prompts)] for i in range(number)), key=len)
    owner: Any = model
    before, ends = owner.generation_config, _ends(owner, tokenizer)
    device = next(model.parameters()).device
    found: list[tuple[list[int], int]] = []
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet(transformers), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, number, batch):
                progress(start, number)
                part = taken[start : start + batch]
                width = max(map(len, part))
                padding = [width - len(prompt) for prompt in part]
                # The folder's own settings, such as a temperature, would change the probabilities.
                owner.generation_config = transformers.GenerationConfig(
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=max(1, min(longest, examples.limit - width)),
                    pad_token_id=examples.pad,
                    eos_token_id=ends or None,
                )
                ids = torch.tensor(
                    [[examples.pad] * n + own for n, own in zip(padding, part, strict=True)], device=device
                )
                there = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(device)
                made = owner.generate(input_ids=ids, attention_mask=there)[:, width:].tolist()
                found += [([*prompt, *_cut(own, ends)], len(prompt)) for prompt, own in zip(part, made, strict=True)]
    finally:
        owner.generation_config = before
    return found


def _start(model: nn.Module, tokenizer: Any) -> int:
    """The token that begins a text."""
    config: Any = model.config
    for token in (tokenizer.bos_token_id, getattr(config, "bos_token_id", None)):
        if token is not None and 0 <= token < vocabulary(model):
            return int(token)
    raise SourceError(
        "neither the tokenizer nor the model has a start token, so nothing begins a generated text; give examples with"
        " prompts, or no --fit-generate (generate=)"
    )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    every = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(token) for token in every if token is not None})


def _cut(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Token ids up to the first end, which is the last of them."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: last + 1])
