"""What a model's forward pass gets of tokenised examples, and which rows of its outputs count."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shiradelta.text.rows import TokenRows


class ModelInputs(ABC):
    """Tokenised examples, and how a batch of them becomes the arguments of a model's forward pass.

    Attributes:
        lengths: tokens by example; examples of similar length share a batch.
        rows: the rows of the model's output, which say what is predicted.
        sides: texts of an example whose embeddings are compared, or pictures and texts.
        embeds: whether the model itself gives the embeddings.
        pad: the token to pad with.
        limit: the longest text in tokens.
    """

    lengths: list[int]
    rows: TokenRows
    sides: int = 1
    embeds: bool = False
    pad: int
    limit: int

    @abstractmethod
    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of the forward pass on a batch; tensors are on the CPU."""

    @abstractmethod
    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        """The hidden states of all layers [texts, tokens, size], each with its rows; the output's layers come last."""

    def embeddings(self, result: Any) -> Tensor:
        """The embeddings that the model gives of a batch [sides x examples, size], side after side, if it `embeds`."""
        raise NotImplementedError

    def extend(self, rows: Sequence[Any]) -> None:
        """Adds examples that `shiradelta.fit.generate` has made, after the others, if it makes such examples."""
        raise NotImplementedError

    @property
    def layer_rows(self) -> Sequence[TokenRows]:
        """Every kind of rows that a layer may get."""
        return [self.rows]


def moved(arguments: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Arguments on a model's device, floating-point numbers in its dtype."""
    weight = next(model.parameters())

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Made on the CPU, where nothing waits for it; each transfer on a GPU would.
        return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype, non_blocking=True)

    return {name: of(value) for name, value in arguments.items()}


def generates(model: nn.Module) -> bool:
    """Whether a model's logits predict tokens of a text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def hears(model: nn.Module) -> bool:
    """Whether a model's encoder gets features of sound."""
    return getattr(model, "main_input_name", "") == "input_features"


def is_seq2seq(model: nn.Module) -> bool:
    """Whether a model reads a text in its encoder, and predicts another one in its decoder."""
    config = getattr(model, "config", None)
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return bool(getattr(config, "is_encoder_decoder", False)) and decodes and generates(model)
