"""Texts that a fine-tuned language model generates itself, for a fit that has few examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.models.loading import quiet
from shiradelta.text.inputs import ModelInputs
from shiradelta.text.seq2seq import Seq2SeqExamples
from shiradelta.text.tokenised import TokenisedExamples
from shiradelta.text.tokens import vocabulary


def generate(
    model: nn.Module,
    tokenizer: Any,
    examples: ModelInputs,
    indices: Sequence[int],
    number: int,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Any]:
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
        What `extend` of the examples takes: for each text (its token ids, its end included; how many of these are the
        prompt), or of an encoder-decoder (token ids of the prompt, those of what the model says to it).

    Raises:
        SourceError: there are no prompts, and neither the tokenizer nor the model has a start token; or an
            encoder-decoder begins a text with the token that ends it; or no texts are generated for such examples.
    """
    if isinstance(examples, Seq2SeqExamples):
        sampler: _Sampler = _Answers(model, tokenizer, examples, indices)
    elif isinstance(examples, TokenisedExamples):
        sampler = _Texts(model, tokenizer, examples, indices)
    else:
        raise SourceError(f"no texts are generated for {type(model).__name__}; leave out --fit-generate (generate=)")
    return sampler.run(number, batch, seed, progress)


class _Sampler(ABC):
    """Goes on from the prompts of some examples.

    Args:
        model: a language model of transformers.
        tokenizer: the model's.
        pad: the token to pad with.
    """

    #: What texts are made from, one for each example.
    prompts: list[Any]

    def __init__(self, model: nn.Module, tokenizer: Any, pad: int) -> None:
        self._model: Any = model
        self._pad, self._device = pad, next(model.parameters()).device
        self._ends = _ends(model, tokenizer)

    @abstractmethod
    def length(self, prompt: Any) -> Any:
        """What prompts are sorted by, so that those of a pass are alike."""

    @abstractmethod
    def sample(self, prompts: Sequence[Any]) -> list[Any]:
        """One text for each prompt, as `extend` takes it."""

    def run(self, number: int, batch: int, seed: int, progress: Callable[[int, int], None]) -> list[Any]:
        """So many texts; arguments are those of `generate`."""
        import transformers

        found: list[Any] = []
        taken = sorted((self.prompts[i % len(self.prompts)] for i in range(number)), key=self.length)
        devices = [self._device] if self._device.type == "cuda" else []
        before = self._model.generation_config
        try:
            with torch.random.fork_rng(devices), quiet(transformers), torch.no_grad():
                torch.manual_seed(seed)
                for start in range(0, number, batch):
                    progress(start, number)
                    found += self.sample(taken[start : start + batch])
        finally:
            self._model.generation_config = before
        return found

    def _generate(self, most: int, start: int | None = None, **inputs: Tensor) -> list[list[int]]:
        """Samples up to so many tokens, at least one, after those that the model is given.

        Args:
            most: tokens.
            start: the token that a decoder starts with, where there is one.
            inputs: what the model is given.
        """
        import transformers

        # The folder's own settings, such as a temperature, would change the probabilities.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=max(1, most),
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
            decoder_start_token_id=start,
        )
        made: list[list[int]] = self._model.generate(**inputs).tolist()
        return made

    def _padded(self, rows: Sequence[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """(token ids, 1 where there is one) of a batch."""
        width, ids, there = max(map(len, rows)), [], []
        for row in rows:
            padding = [0] * (width - len(row))
            blank, one = [self._pad for _ in padding], [1] * len(row)
            ids.append(blank + row if left else row + blank)
            there.append(padding + one if left else one + padding)
        return torch.tensor(ids, device=self._device), torch.tensor(there, device=self._device)

    def _cut(self, ids: Sequence[int]) -> list[int]:
        """Token ids up to the first end, which is the last of them."""
        last = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        return list(ids[: last + 1])


class _Texts(_Sampler):
    """Texts of a model that reads one: (token ids, how many of these are the prompt)."""

    def __init__(self, model: nn.Module, tokenizer: Any, examples: TokenisedExamples, indices: Sequence[int]) -> None:
        super().__init__(model, tokenizer, examples.pad)
        rows = [examples.row(index) for index in indices]
        self.prompts: list[list[int]] = [ids[:prompt] or [_start(model, tokenizer)] for ids, prompt in rows]
        self._longest, self._limit = max(len(ids) - prompt for ids, prompt in rows), examples.limit

    def length(self, prompt: list[int]) -> int:
        return len(prompt)

    def sample(self, prompts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        width = max(map(len, prompts))
        ids, there = self._padded(prompts, left=True)
        made = self._generate(min(self._longest, self._limit - width), input_ids=ids, attention_mask=there)
        return [([*prompt, *self._cut(own[width:])], len(prompt)) for prompt, own in zip(prompts, made, strict=True)]


class _Answers(_Sampler):
    """What an encoder-decoder says to prompts: (token ids of the prompt, those of the answer)."""

    def __init__(self, model: nn.Module, tokenizer: Any, examples: Seq2SeqExamples, indices: Sequence[int]) -> None:
        super().__init__(model, tokenizer, examples.pad)
        self.prompts: list[tuple[list[int], list[int]]] = [
            (examples.row(index)[0], examples.start(index)) for index in indices
        ]
        self._longest = max(examples.labels.lengths[index] for index in indices)

    def length(self, prompt: tuple[list[int], list[int]]) -> tuple[int, int]:
        source, start = prompt
        return len(start), len(source)

    def sample(self, prompts: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        # What texts of one pass begin with has one length: padding before it would be read.
        by_start = groupby(prompts, key=lambda prompt: len(prompt[1]))
        return [answer for begun, some in by_start for answer in self._of_one_start(begun, list(some))]

    def _of_one_start(
        self, begun: int, prompts: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        ids, there = self._padded([source for source, _ in prompts])
        starts, _ = self._padded([start for _, start in prompts])
        # Labels lack the decoder's start.
        most = self._longest - (begun - 1)
        made = self._generate(most, prompts[0][1][0], input_ids=ids, attention_mask=there, decoder_input_ids=starts)
        return [
            (source, [*start[1:], *self._cut(own[begun:])]) for (source, start), own in zip(prompts, made, strict=True)
        ]


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
