"""What of a model is to be reproduced on the given texts, and how far one model is from another in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError

#: What the output weighs in the loss; the rest is shared by all layers, which tell the early ones what to do.
LAST = 0.5
#: What a forward pass gives to compare: matrices, one row a token or a text.
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

    def calibrate(self, base: Outputs, teacher: Outputs) -> None:
        """Learns how far the base is from the teacher, so that the loss is 1 for the base in each term."""
        self._scales = [float(d) for d in self.differences(base, teacher)]
        if not all(map(_finite, self._scales)):
            raise SourceError("the fine-tune gives NaN or infinity on these texts; check it, or fit in float32")
        if not any(self._scales):
            raise SourceError("the fine-tune behaves like its base on these texts; give texts of its own task")

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The share of the base's difference that is left, averaged over the terms."""
        terms = zip(self.differences(student, teacher), self._scales, strict=True)
        left = torch.stack([term / scale for term, scale in terms if scale > 0])
        return LAST * left[-1] + (1 - LAST) * left.mean()

    @abstractmethod
    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """What is reported."""

    def slices(self, outputs: Outputs, indices: Sequence[int]) -> list[Outputs] | None:
        """A batch's outputs by example, or None if they cannot be told apart."""
        return None


class TextBehaviour(Behaviour):
    """Hidden states of all layers, and logits where the model has them, of models of transformers."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], model: nn.Module, tokens: int) -> None:
        super().__init__()
        limit = min(
            tokens,
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None) or tokens,
        )
        self._ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        self.lengths = [len(ids) for ids in self._ids]
        if not all(self.lengths):
            raise SourceError("a text has no tokens; leave it out")
        largest, size = max(map(max, self._ids)), model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if largest >= size:
            raise SourceError(f"the tokenizer gives token {largest}, the model has {size}; they do not belong together")
        self._pad = tokenizer.pad_token_id or 0
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self._pad  # a classifier on a causal LM looks for the last token by it
        self._logits: str = ""
        self.measure = "relative error of hidden states"

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Rows of tokens, padding left out; of a classifier's logits one row a text."""
        device = next(model.parameters()).device
        chosen = [torch.tensor(self._ids[index]) for index in indices]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=self._pad).to(device)
        lengths = torch.tensor([len(c) for c in chosen], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        result = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        rows = [hidden[mask] for hidden in result.hidden_states[1:]]
        logits = getattr(result, "logits", None)
        if logits is not None:
            self._logits = "token" if logits.dim() == 3 else "text"
            self.measure = "KL divergence of the output, nats"
            rows.append(logits[mask] if logits.dim() == 3 else logits)
        return rows

    def differences(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Mean squared errors of hidden states, KL divergence of logits."""
        pairs = list(zip(student, teacher, strict=True))
        hidden = pairs[:-1] if self._logits else pairs
        terms = [(s.float() - t.float()).square().sum(1).mean() for s, t in hidden]
        return [*terms, _divergence(*pairs[-1])] if self._logits else terms

    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """Of the logits, or of the last hidden states."""
        s, t = student[-1].float(), teacher[-1].float()
        return float(_divergence(s, t)) if self._logits else float((s - t).norm() / t.norm())

    def slices(self, outputs: Outputs, indices: Sequence[int]) -> list[Outputs] | None:
        """As rows lie text after text."""
        lengths = [self.lengths[index] for index in indices]
        parts = [torch.split(rows, lengths if len(rows) == sum(lengths) else 1) for rows in outputs]
        return [list(text) for text in zip(*parts, strict=True)]


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, student), mean over rows; of a single output, a regression's, half the squared error."""
    if student.shape[-1] == 1:
        return (student.float() - teacher.float()).square().mean() / 2
    expected = teacher.float().log_softmax(-1)
    return nn.functional.kl_div(student.float().log_softmax(-1), expected, reduction="batchmean", log_target=True)


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


def _finite(number: float) -> bool:
    return number - number == 0
