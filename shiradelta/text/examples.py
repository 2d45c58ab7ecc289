"""Examples to train on, and the loss of each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.pooling import pool
from shiradelta.text.read import ExampleSet
from shiradelta.text.tokenised import TokenisedExamples

#: Temperature of the contrastive loss, as in sentence-transformers' models.
TEMPERATURE = 0.05


class Examples(ABC):
    """Examples of one kind, tokenised, with a loss.

    Args:
        tokenised: the examples.
        pooling: how token vectors become an embedding, where embeddings are compared (`find_pooling`).

    Attributes:
        lengths: tokens by example; examples of similar length share a batch.
    """

    def __init__(self, tokenised: TokenisedExamples, pooling: str | None = None) -> None:
        self._tokenised, self._pooling = tokenised, pooling
        self.lengths = tokenised.lengths

    @abstractmethod
    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Mean loss over some examples."""

    def _batch(self, model: nn.Module, indices: Sequence[int]) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        ids, there = self._tokenised.table.padded(self._tokenised.texts(indices), self._tokenised.pad)
        return {"input_ids": ids.to(device), "attention_mask": there.long().to(device)}


class Predicted(Examples):
    """Texts, completions and conversations, of which a language model predicts the tokens that count."""

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy, averaged over the tokens that count, by their weights."""
        batch = self._batch(model, indices)
        logits = model(**batch).logits
        weights = self._weights(indices)[:, 1:].to(logits.device)
        kept = weights > 0
        entropy = nn.functional.cross_entropy(
            logits[:, :-1][kept].float(), batch["input_ids"][:, 1:][kept], reduction="none"
        )
        return (entropy * weights[kept]).sum() / weights.sum()

    def _weights(self, indices: Sequence[int]) -> Tensor:
        """How much each token of a padded batch counts, on the CPU; padding does not."""
        slots, there = self._tokenised.table.slots(indices)
        weights = self._tokenised.weights
        return there.float() if weights is None else torch.where(there, weights[torch.where(there, slots, 0)], 0)


class Pairs(Examples):
    """Pairs of matching texts: within a batch, each text has to find its partner."""

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy of the cosines over a temperature of 0.05, both ways (multiple negatives ranking)."""
        batch = self._batch(model, indices)
        hidden = getattr(model(**batch), "last_hidden_state", None)
        if hidden is None:
            raise SourceError("the model gives no last_hidden_state, which pairs train; give an encoder, or texts")
        one, other = pool(hidden.float(), batch["attention_mask"], self._pooling, model).chunk(2)
        similarity = one @ other.T / TEMPERATURE
        target = torch.arange(len(similarity), device=similarity.device)
        entropy = nn.functional.cross_entropy
        return (entropy(similarity, target) + entropy(similarity.T, target)) / 2


def training_examples(
    examples: ExampleSet,
    tokenizer: Any,
    model: nn.Module,
    tokens: int,
    pooling: str | None = None,
    prompt_share: float = 0.0,
) -> Examples:
    """Tokenises examples to train on; arguments and errors are those of `TokenisedExamples` and `Examples`."""
    found = TokenisedExamples(examples, tokenizer, model, tokens, prompt_share, ends=examples.kind.predicts)
    if not examples.kind.predicts:
        return Pairs(found, pooling)
    found.check_predicted()
    return Predicted(found)
