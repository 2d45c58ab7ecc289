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

    def row(self, index: int) -> list[int]:
        """The token ids of one text."""
        start = int(self._starts[index])
        found: list[int] = self.ids[start : start + self.lengths[index]].tolist()
        return found

    def slots(self, indices: Sequence[int], width: int = 0) -> tuple[Tensor, Tensor]:
        """(index into `ids` of each token of a padded batch [texts, tokens], which of them are not padding).

        Args:
            indices: the texts.
            width: tokens to pad to, if that is more than the longest text has.
        """
        texts = list(indices)  # a tuple would index dimensions
        lengths, starts = self._lengths[texts], self._starts[texts]
        offsets = torch.arange(max(width, int(lengths.max())))
        return starts[:, None] + offsets, offsets < lengths[:, None]

    def ends(self, indices: Sequence[int]) -> Tensor:
        """Index into `ids` just after each text's last token."""
        return (self._starts + self._lengths)[list(indices)]

    def padded(self, indices: Sequence[int], pad: int, width: int = 0) -> tuple[Tensor, Tensor]:
        """(token ids [texts, tokens], which of them are not padding) of a batch, on the CPU; width as of `slots`."""
        slots, there = self.slots(indices, width)
        return torch.where(there, self.ids[torch.where(there, slots, 0)], pad), there


#: Keys of a configuration that say how many positions there are: of a model, of an encoder, of a decoder.
_POSITIONS = ("max_position_embeddings",)
_OF_ENCODER = ("max_encoder_position_embeddings", *_POSITIONS)
_OF_DECODER = ("max_decoder_position_embeddings", "max_target_positions", *_POSITIONS)


def token_limit(tokens: int, tokenizer: Any, model: nn.Module) -> int:
    """The longest text in tokens: at most `tokens`, the tokenizer's limit and the model's positions."""
    limit = min(tokens, int(tokenizer.model_max_length))
    return min(limit, position_limit(model) or limit)


def side_limits(tokens: int, tokenizer: Any, model: nn.Module) -> tuple[int, int]:
    """As `token_limit`, of an encoder-decoder: (that of texts for its encoder, that of texts for its decoder)."""
    limit = min(tokens, int(tokenizer.model_max_length))
    return min(limit, _positions(model, _OF_ENCODER) or limit), min(limit, _positions(model, _OF_DECODER) or limit)


def position_limit(model: nn.Module) -> int | None:
    """Number of tokens that a model has positions for; None if its configuration does not say.

    RoBERTa and its kin number positions from `padding_idx + 1`, so that many of their positions are never used.
    """
    count = _positions(model, _POSITIONS)
    if count is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return count - int(module.padding_idx) - 1
    return count


def _positions(model: nn.Module, keys: Sequence[str]) -> int | None:
    """The number under the first of some keys that the configuration has, or that of the text within it."""
    config: Any = model.config
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    found = (getattr(part, key, None) for part in parts for key in keys)
    return next((int(count) for count in found if isinstance(count, int) and count > 0), None)


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
            f"{type(model).__name__} has no token embeddings of its own, so texts alone do not run it: CLIP and its"
            " kin take image and text; from Python, Fit takes model and forward, and attach takes any module"
        ) from None


def padding_token(tokenizer: Any, model: nn.Module) -> int:
    """The token to pad with: the model's own, else the tokenizer's, else 0."""
    config: Any = model.config
    own = getattr(config, "pad_token_id", None)
    known = own is not None and 0 <= own < vocabulary(model)
    return int((own if known else tokenizer.pad_token_id) or 0)
