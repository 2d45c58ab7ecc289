"""What of a model is to be reproduced on the given texts, and how far one model is from another in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError

from .divergence import divergence, divergence_of_labels

#: What the output weighs in the loss; the rest is shared by all terms, which tell the early layers what to do.
LAST = 0.5
#: What a forward pass gives to compare: matrices, one row a token or a text; the output is the last.
Outputs = list[Tensor]


class Behaviour(ABC):
    """Outputs of a model on examples, and their difference."""

    #: What `distance` is, in words.
    measure: str
    #: By example; those of like length share a batch.
    lengths: list[int]

    def __init__(self) -> None:
        self._scales: list[float] = []

    @abstractmethod
    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Of some examples."""

    @abstractmethod
    def differences(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Scalars, one a term of the loss, each zero for equal outputs."""

    def calibrate(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> None:
        """Learns from (base's, teacher's) of some batches how far they are apart: the base's loss is 1 in each term."""
        found = [torch.stack(self.differences(base, teacher)) for base, teacher in pairs]
        self._scales = torch.stack(found).mean(0).tolist()
        if not all(map(math.isfinite, self._scales)):
            raise SourceError("the fine-tune gives NaN or infinity on these texts; check it, or fit in float32")
        if not any(scale > 0 for scale in self._scales):
            raise SourceError("the fine-tune behaves like its base on these texts; give texts of its own task")

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The share of the base's difference that is left, averaged over the terms."""
        terms = zip(self.differences(student, teacher), self._scales, strict=True)
        left = torch.stack([term / scale for term, scale in terms if scale > 0])
        return LAST * left[-1] + (1 - LAST) * left.mean()

    @abstractmethod
    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """What is reported."""

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]] | None:
        """Where each output's rows lie among those of all examples, and how many these are; None: nobody knows."""
        return None


class TextBehaviour(Behaviour):
    """Models of transformers: hidden states of all layers, and logits, or else the embedding of the text."""

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], model: nn.Module, tokens: int, pooling: str = "mean"
    ) -> None:
        super().__init__()
        if not all(isinstance(text, str) for text in texts):
            raise SourceError("the texts to fit on have to be strings; other examples need `forward`")
        limit = min(tokens, tokenizer.model_max_length, _positions(model) or tokens)
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        self.lengths = [len(one) for one in ids]
        if not all(self.lengths):
            raise SourceError("a text has no tokens; leave it out")
        largest, size = max(map(max, ids)), model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if largest >= size:
            raise SourceError(f"the tokenizer gives token {largest}, the model has {size}; they do not belong together")
        config: Any = model.config
        told = getattr(config, "pad_token_id", None)
        known = told is not None and 0 <= told < size
        self._pad: int = (told if known else tokenizer.pad_token_id) or 0
        config.pad_token_id = self._pad  # a classifier on a causal LM looks for the last token by it
        #: Whether the logits are of labels of which any number can hold.
        self._labels = getattr(config, "problem_type", None) == "multi_label_classification"
        self._ids = torch.tensor([token for one in ids for token in one])
        self._lengths = torch.tensor(self.lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._device = next(model.parameters()).device
        self._pooling = pooling
        self._output = ""
        self._per_token: list[bool] = []
        self.measure = "relative error of hidden states"

    def _places(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of a padded batch: which of all tokens each is [examples, tokens], and which are no padding.  On the CPU."""
        lengths, starts = self._lengths[indices], self._starts[indices]
        offsets = torch.arange(int(lengths.max()))
        return starts[:, None] + offsets, offsets < lengths[:, None]

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Rows of tokens, padding left out; of a classifier's logits and of embeddings one row a text."""
        # Made on the CPU, where nothing waits for it; each transfer and each mask used as an index on a GPU would.
        places, there = self._places(indices)
        ids = torch.where(there, self._ids[torch.where(there, places, 0)], self._pad)
        kept = there.flatten().nonzero()[:, 0]
        ids, mask, kept = (t.to(self._device, non_blocking=True) for t in (ids, there.long(), kept))
        result = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        rows = [hidden.flatten(0, 1)[kept] for hidden in result.hidden_states[1:]]
        self._per_token = [True] * len(rows)
        logits = getattr(result, "logits", None)
        if logits is None:
            self._output = "embedding"
            rows.append(pool(result.hidden_states[-1], mask, self._pooling))
        else:
            self._output = "logits"
            self.measure = f"KL divergence of the {'labels' if self._labels else 'output'}, nats"
            rows.append(logits.flatten(0, 1)[kept] if logits.dim() == 3 else logits)
        self._per_token.append(logits is not None and logits.dim() == 3)
        return rows

    def differences(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Squared errors of hidden states and embeddings, KL divergence of logits; means over rows."""
        pairs = list(zip(student, teacher, strict=True))
        logits = [pairs.pop()] if self._output == "logits" else []
        terms = [(s.float() - t.float()).square().sum(1).mean() for s, t in pairs]
        return terms + [self._divergence(s, t) for s, t in logits]

    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """Of the logits, or of the last hidden states."""
        if self._output == "logits":
            return float(self._divergence(student[-1], teacher[-1]))
        s, t = student[-2].float(), teacher[-2].float()
        return float((s - t).norm() / t.norm())

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence_of_labels(student, teacher) if self._labels else divergence(student, teacher)

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Tokens lie text after text."""
        places, there = self._places(indices)
        of_tokens = places[there].to(self._device, non_blocking=True), len(self._ids)
        of_texts = torch.tensor(indices).to(self._device, non_blocking=True), len(self.lengths)
        return [of_tokens if per_token else of_texts for per_token in self._per_token]


def _positions(model: nn.Module) -> int | None:
    """Tokens that a model has positions for, if it says so; RoBERTa's do not start at the first one."""
    config: Any = model.config
    count = getattr(config, "max_position_embeddings", None)
    if not count or count < 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(count) - int(module.padding_idx) - 1
    return int(count)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[examples, tokens, size] -> one unit vector a text, as sentence-transformers makes it."""
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "lasttoken":
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    elif pooling == "max":
        pooled = hidden.masked_fill(mask[:, :, None] == 0, -math.inf).amax(1)
    else:
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.normalize(pooled.float(), dim=-1)


class CustomBehaviour(Behaviour):
    """What a user's own `forward` gives."""

    measure = "relative error of the outputs"

    def __init__(
        self,
        examples: Sequence[Any],
        forward: Callable[[Any, Sequence[Any]], Any],
        loss: Callable[[Any, Any], Any] | None,
    ) -> None:
        super().__init__()
        self._examples, self._forward, self._loss = examples, forward, loss
        self.lengths = [0] * len(examples)
        if loss is not None:
            self.measure = "the given loss"

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """As `forward` gives them."""
        found = self._forward(model, [self._examples[index] for index in indices])
        return [found] if isinstance(found, Tensor) else list(found)

    def differences(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """The user's loss, or mean squared errors."""
        if self._loss is not None:
            one = len(student) == 1
            return [self._loss(student[0] if one else student, teacher[0] if one else teacher)]
        return [(s.float() - t.float()).square().mean() for s, t in zip(student, teacher, strict=True)]

    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """The user's loss, or the relative error of all outputs together."""
        if self._loss is not None:
            return float(self.differences(student, teacher)[0])
        error = sum(float((s.float() - t.float()).square().sum()) for s, t in zip(student, teacher, strict=True))
        size = sum(float(t.float().square().sum()) for t in teacher)
        return float((error / max(size, 1e-30)) ** 0.5)
