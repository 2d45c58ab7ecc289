"""Token ids of texts: cuts them, pads batches, and checks that they fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError


class TokenTable:
    """Token ids of many texts in one vector on the CPU, from which padded batches are cut.

    Attributes:
        ids: int64 [tokens], text after text.
        lengths: tokens of each text.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(row) for row in rows]
        self.ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        self._lengths = torch.tensor(self.lengths, dtype=torch.int64)
        self._starts = self._lengths.cumsum(0) - self._lengths

    def slots(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(index into `ids` of each token of a padded batch [texts, tokens], which of them are not padding)."""
        texts = list(indices)  # a tuple would index dimensions
        lengths, starts = self._lengths[texts], self._starts[texts]
        offsets = torch.arange(int(lengths.max()))
        return starts[:, None] + offsets, offsets < lengths[:, None]

    def ends(self, indices: Sequence[int]) -> Tensor:
        """Index into `ids` just after each text's last token."""
        return (self._starts + self._lengths)[list(indices)]

    def padded(self, indices: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
        """(token ids [texts, tokens], which of them are not padding) of a batch, on the CPU."""
        slots, there = self.slots(indices)
        return torch.where(there, self.ids[torch.where(there, slots, 0)], pad), there


def token_limit(tokens: int, tokenizer: Any, model: nn.Module) -> int:
    """The longest text in tokens: at most `tokens`, the tokenizer's limit and the model's positions."""
    limit = min(tokens, int(tokenizer.model_max_length))
    return min(limit, position_limit(model) or limit)


def position_limit(model: nn.Module) -> int | None:
    """Number of tokens that a model has positions for; None if its configuration does not say.

    RoBERTa and its kin number positions from `padding_idx + 1`, so that many of their positions are never used.
    """
    config: Any = model.config
    count = getattr(config, "max_position_embeddings", None)
    if not count or count < 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(count) - int(module.padding_idx) - 1
    return int(count)


def check_vocabulary(largest: int, model: nn.Module) -> None:
    """Raises SourceError if a tokenizer gives tokens that the model has no embedding for.

    The message begins with the model's folder, where that is known.
    """
    size = vocabulary(model)
    if largest >= size:
        folder = getattr(model, "name_or_path", "")
        where = f"{folder}: " if folder else ""
        raise SourceError(
            f"{where}the tokenizer gives token {largest}, the model has {size}; they do not belong together"
        )


def vocabulary(model: nn.Module) -> int:
    """Number of tokens that a model has embeddings for.

    Raises:
        SourceError: the model has no embeddings of tokens, or is made of several that have.
    """
    try:
        return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        raise SourceError(
            f"{type(model).__name__} has no token embeddings of its own, so texts alone do not run it; from Python, Fit"
            " takes model and forward, and attach takes any module"
        ) from None


def padding_token(tokenizer: Any, model: nn.Module) -> int:
    """The token to pad with: the model's own, else the tokenizer's, else 0."""
    config: Any = model.config
    own = getattr(config, "pad_token_id", None)
    known = own is not None and 0 <= own < vocabulary(model)
    return int((own if known else tokenizer.pad_token_id) or 0)
