"""What is trained on: texts, prompts with completions, or pairs, as JSON Lines."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.pooling import pool
from shiradelta.text.texts import LEAST

#: Of the contrastive loss; that of sentence-transformers' models.
TEMPERATURE = 0.05
_IGNORED = -100


class Examples(ABC):
    """Examples of one kind, tokenised.

    Attributes:
        keys: of a line's object.
        lengths: tokens by example; those of like length share a batch.
        largest: token of all.
    """

    keys: tuple[str, ...]
    lengths: list[int]

    def __init__(self, rows: Sequence[Sequence[str]], tokenizer: Any, tokens: int, pooling: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._tokens = min(tokens, tokenizer.model_max_length)
        self._pad = tokenizer.pad_token_id or 0
        self._pooling = pooling
        self.largest = 0
        self._encode(rows)

    @abstractmethod
    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        """Tokenises all examples."""

    @abstractmethod
    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """The mean over some examples."""

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._tokens, **options)[
            "input_ids"
        ]
        self.largest = max(self.largest, *map(max, filter(None, found)), 0)
        return found

    def _batch(self, ids: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
        rows = [torch.tensor(row) for row in ids]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


class Texts(Examples):
    """Whole texts, each token to be predicted."""

    keys: tuple[str, ...] = ("text",)

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        self._rows = [self._ended(ids) for ids in self._ids([row[0] for row in rows])]
        self._first = [1] * len(self._rows)
        self._finish()

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or len(ids) >= self._tokens or ids[-1:] == [end] else [*ids, end]

    def _finish(self) -> None:
        self.lengths = [len(ids) for ids in self._rows]
        short = [i for i, (ids, first) in enumerate(zip(self._rows, self._first, strict=True)) if len(ids) <= first]
        if short:
            raise SourceError(
                f"example {short[0] + 1} has nothing to predict within {self._tokens} tokens; leave it out, or give"
                " --tokens a larger number"
            )

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy, mean over the tokens that are to be predicted."""
        batch = self._batch([self._rows[i] for i in indices], next(model.parameters()).device)
        logits = model(**batch).logits
        at = torch.arange(batch["input_ids"].shape[1], device=logits.device)
        first = torch.tensor([self._first[i] for i in indices], device=logits.device)
        wanted = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (at < first[:, None]), _IGNORED)
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), wanted[:, 1:].flatten(), ignore_index=_IGNORED
        )


class Completions(Texts):
    """Prompts and completions, of which the latter are to be predicted."""

    keys = ("prompt", "completion")

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        end = self._tokenizer.eos_token_id
        prompts = [ids[:-1] if ids[-1:] == [end] else ids for ids in self._ids([prompt for prompt, _ in rows])]
        completions = self._ids([completion for _, completion in rows], add_special_tokens=False)
        self._rows = [
            self._ended(prompt + completion)[: self._tokens]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        self._first = [max(1, len(prompt)) for prompt in prompts]
        self._finish()


class Pairs(Examples):
    """Pairs that belong together; in a batch, each has to find its other among all."""

    keys = ("anchor", "positive")

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        self._sides = [self._ids(side) for side in zip(*rows, strict=True)]
        self.lengths = [max(len(ids) for ids in pair) for pair in zip(*self._sides, strict=True)]

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy of the cosines over a temperature of 0.05, both ways (multiple negatives ranking)."""
        one, other = (self._embed(model, [side[i] for i in indices]) for side in self._sides)
        similarity = one @ other.T / TEMPERATURE
        target = torch.arange(len(similarity), device=similarity.device)
        entropy = nn.functional.cross_entropy
        return (entropy(similarity, target) + entropy(similarity.T, target)) / 2

    def _embed(self, model: nn.Module, ids: Sequence[Sequence[int]]) -> Tensor:
        batch = self._batch(ids, next(model.parameters()).device)
        hidden = getattr(model(**batch), "last_hidden_state", None)
        if hidden is None:
            raise SourceError("the model gives no last_hidden_state, which pairs train; give an encoder, or texts")
        return pool(hidden.float(), batch["attention_mask"], self._pooling)


KINDS: tuple[type[Examples], ...] = (Texts, Completions, Pairs)


def read_examples(
    path: Path, tokenizer: Any, tokens: int, pooling: str | None = None
) -> tuple[Examples, list[list[str]]]:
    """(the examples of a file, its rows as they are written); what kind they are its first line tells.

    Args:
        path: JSON Lines.
        tokenizer: the model's.
        tokens: longer examples are cut.
        pooling: how token vectors of a text become one, where pairs are compared (`fit.loading.pooling`).

    Raises:
        SourceError: a line that is none of the kinds, or not of the first one's; too few; nothing to predict.
    """
    kind: type[Examples] | None = None
    rows: list[list[str]] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    kind, row = _row(line, f"{path}, line {number}", kind)
                    rows.append(row)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8; save it as UTF-8") from None
    if kind is None or len(rows) < LEAST:
        raise SourceError(f"{path}: {len(rows)} examples are too few to train on; give {LEAST}, better some thousands")
    return kind(rows, tokenizer, tokens, pooling), rows


def _row(line: str, where: str, kind: type[Examples] | None) -> tuple[type[Examples], list[str]]:
    shapes = " or ".join("{" + ", ".join(f'"{key}": "..."' for key in one.keys) + "}" for one in KINDS)
    try:
        found = json.loads(line)
    except ValueError:
        raise SourceError(f"{where}: is not JSON; write one object a line, such as {shapes}") from None
    for one in [kind] if kind else KINDS:
        values = [found.get(key) for key in one.keys] if isinstance(found, dict) else []
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        if len(texts) == len(one.keys):
            return one, texts
    if kind is not None:
        raise SourceError(f"{where}: has not the keys of the lines before, {' and '.join(kind.keys)}, each with a text")
    raise SourceError(f"{where}: is no example; write {shapes}")
