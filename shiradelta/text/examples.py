"""Examples to train on, and the loss of each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.inputs import ModelInputs, moved
from shiradelta.text.pooling import pool
from shiradelta.text.read import ExampleSet
from shiradelta.text.tokenise import tokenise

#: Temperature of the contrastive loss, as in sentence-transformers' models.
TEMPERATURE = 0.05


class Examples(ABC):
    """Examples of one kind, tokenised, with a loss.

    Args:
        inputs: the examples, tokenised.
        pooling: how token vectors become an embedding, where embeddings are compared (`find_pooling`).

    Attributes:
        lengths: tokens by example; examples of similar length share a batch.
    """

    def __init__(self, inputs: ModelInputs, pooling: str | None = None) -> None:
        self._inputs, self._pooling = inputs, pooling
        self.lengths = inputs.lengths

    @abstractmethod
    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Mean loss over some examples."""


class Predicted(Examples):
    """Texts, completions and conversations, of which a language model predicts the tokens that count."""

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy, averaged over the tokens that count, by their weights."""
        logits = model(**moved(self._inputs.arguments(indices), model)).logits
        rows = self._inputs.rows
        tokens, there = rows.following(indices)
        weights = rows.weights(indices)
        counts = there if weights is None else there * weights
        some = counts > 0
        kept, tokens, counts = (found[some].to(logits.device) for found in (rows.kept(indices), tokens, counts))
        entropy = nn.functional.cross_entropy(logits.flatten(0, 1)[kept].float(), tokens, reduction="none")
        return (entropy * counts).sum() / counts.sum()


class Pairs(Examples):
    """Pairs of matching texts: within a batch, each text has to find its partner."""

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Cross entropy of the cosines over a temperature of 0.05, both ways (multiple negatives ranking)."""
        batch = moved(self._inputs.arguments(indices), model)
        hidden = getattr(model(**batch), "last_hidden_state", None)
        if hidden is None:
            raise SourceError("the model gives no last_hidden_state, which pairs train; give an encoder, or texts")
        mask = batch["attention_mask"].to(hidden.device)
        one, other = pool(hidden.float(), mask, self._pooling, model).chunk(2)
        similarity = one @ other.T / TEMPERATURE
        target = torch.arange(len(similarity), device=similarity.device)
        entropy = nn.functional.cross_entropy
        return (entropy(similarity, target) + entropy(similarity.T, target)) / 2


class Captioned(Examples):
    """Pictures and their captions: within a batch, each has to find its partner."""

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """The model's own loss, as of CLIP or SigLIP."""
        found: Tensor = model(**moved(self._inputs.arguments(indices), model), return_loss=True).loss
        return found


def training_examples(
    examples: ExampleSet,
    tokenizer: Any,
    model: nn.Module,
    tokens: int,
    pooling: str | None = None,
    prompt_share: float = 0.0,
) -> Examples:
    """Tokenises examples to train on; arguments and errors are those of `tokenise` and `Examples`."""
    found = tokenise(examples, tokenizer, model, tokens, prompt_share, trains=examples.kind.predicts)
    if examples.kind.predicts:
        return Predicted(found)
    return Captioned(found) if found.embeds else Pairs(found, pooling)
