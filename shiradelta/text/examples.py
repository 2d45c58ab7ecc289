"""Examples to train on, and the loss of each kind: texts, prompts with completions, pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.jsonl import TEXT, ExampleKind
from shiradelta.text.pooling import pool
from shiradelta.text.tokens import TokenTable, check_vocabulary, padding_token, token_limit
from shiradelta.util.registry import Registry

#: Temperature of the contrastive loss, as in sentence-transformers' models.
TEMPERATURE = 0.05
_IGNORED = -100


class Examples(ABC):
    """Examples of one kind, tokenised.

    Args:
        rows: the texts of each example, as `read_rows` gives them.
        tokenizer: the model's.
        model: the model to train; it sets limits on tokens.
        tokens: longer texts are cut.
        pooling: how token vectors become an embedding, where embeddings are compared (`find_pooling`).

    Attributes:
        lengths: tokens by example; examples of similar length share a batch.

    Raises:
        SourceError: the tokenizer does not belong to the model, or an example has nothing to predict.
    """

    lengths: list[int]

    def __init__(
        self,
        rows: Sequence[Sequence[str]],
        tokenizer: Any,
        model: nn.Module,
        tokens: int,
        pooling: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = token_limit(tokens, tokenizer, model)
        self._pad = padding_token(tokenizer, model)
        self._pooling = pooling
        self._largest = 0
        self._encode(rows)
        check_vocabulary(self._largest, model)

    @abstractmethod
    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        """Tokenises all examples."""

    @abstractmethod
    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Mean loss over some examples."""

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._tokens, **options)[
            "input_ids"
        ]
        self._largest = max(self._largest, *map(max, filter(None, found)), 0)
        return found

    def _batch(self, table: TokenTable, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        ids, there = table.padded(indices, self._pad)
        return {"input_ids": ids.to(device), "attention_mask": there.long().to(device)}


class Texts(Examples):
    """Whole texts; every token is predicted."""

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        ids = [self._ended(ids) for ids in self._ids([row[0] for row in rows])]
        self._finish(ids, [1] * len(ids))

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or len(ids) >= self._tokens or ids[-1:] == [end] else [*ids, end]

    def _finish(self, rows: list[list[int]], first: list[int]) -> None:
        """Takes the token ids, and the index of the first token that is predicted."""
        self._table, self._first = TokenTable(rows), torch.tensor(first)
        self.lengths = self._table.lengths
        short = next((i for i, length in enumerate(self.lengths) if length <= first[i]), None)
        if short is not None:
            raise SourceError(
                f"example {short + 1} has nothing to predict within {self._tokens} tokens; leave it out, or give"
                " --tokens a larger number"
            )

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy, averaged over the tokens that are predicted."""
        batch = self._batch(self._table, indices, next(model.parameters()).device)
        logits = model(**batch).logits
        at = torch.arange(batch["input_ids"].shape[1], device=logits.device)
        first = self._first[indices].to(logits.device)
        wanted = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (at < first[:, None]), _IGNORED)
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), wanted[:, 1:].flatten(), ignore_index=_IGNORED
        )


class Completions(Texts):
    """Prompts with completions; only the tokens of the completion are predicted."""

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        end = self._tokenizer.eos_token_id
        prompts = [ids[:-1] if ids[-1:] == [end] else ids for ids in self._ids([prompt for prompt, _ in rows])]
        completions = self._ids([completion for _, completion in rows], add_special_tokens=False)
        pairs = zip(prompts, completions, strict=True)
        ids = [self._ended(prompt + completion)[: self._tokens] for prompt, completion in pairs]
        self._finish(ids, [max(1, len(prompt)) for prompt in prompts])


class Pairs(Examples):
    """Pairs of matching texts: within a batch, each text has to find its partner."""

    def _encode(self, rows: Sequence[Sequence[str]]) -> None:
        self._sides = [TokenTable(self._ids(side)) for side in zip(*rows, strict=True)]
        self.lengths = [max(pair) for pair in zip(*(side.lengths for side in self._sides), strict=True)]

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy of the cosines over a temperature of 0.05, both ways (multiple negatives ranking)."""
        one, other = (self._embed(model, side, indices) for side in self._sides)
        similarity = one @ other.T / TEMPERATURE
        target = torch.arange(len(similarity), device=similarity.device)
        entropy = nn.functional.cross_entropy
        return (entropy(similarity, target) + entropy(similarity.T, target)) / 2

    def _embed(self, model: nn.Module, side: TokenTable, indices: Sequence[int]) -> Tensor:
        batch = self._batch(side, indices, next(model.parameters()).device)
        hidden = getattr(model(**batch), "last_hidden_state", None)
        if hidden is None:
            raise SourceError("the model gives no last_hidden_state, which pairs train; give an encoder, or texts")
        return pool(hidden.float(), batch["attention_mask"], self._pooling, model)


@dataclass(frozen=True)
class TrainingKind(ExampleKind):
    """A kind of example that can be trained on.

    Attributes:
        examples: the class that holds such examples and computes their loss.
        predicts: whether the model has to predict the next token.
    """

    examples: type[Examples]
    predicts: bool


KINDS: Registry[TrainingKind] = Registry(
    "kind of example",
    [
        TrainingKind(TEXT.name, TEXT.keys, Texts, predicts=True),
        TrainingKind("completion", ("prompt", "completion"), Completions, predicts=True),
        TrainingKind("pairs", ("anchor", "positive"), Pairs, predicts=False),
    ],
)
