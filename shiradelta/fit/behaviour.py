"""What of a model is to be reproduced on the given texts, and how far one model is from another in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.divergence import blend, divergence, divergence_of_labels, log_likelihoods
from shiradelta.text.pooling import pool

#: What the output weighs in the loss at first; the rest is shared by all terms, which tell the early layers what to do.
LAST = 0.5
#: What a forward pass gives to compare: matrices, one row a token or a text; the output is the last.
Outputs = list[Tensor]


class Behaviour(ABC):
    """Outputs of a model on examples, and their difference."""

    #: What `distance` is, in words.
    measure: str
    #: By example; those of like length share a batch.
    lengths: list[int]
    #: Of the target, what the examples themselves say.
    text_share = 0.0

    def __init__(self) -> None:
        self._scales: list[float] = []

    @abstractmethod
    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Of some examples."""

    @abstractmethod
    def differences(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Scalars, one a term of the loss, each zero for equal outputs."""

    def calibrate(self, batches: Iterable[tuple[Sequence[int], Outputs, Outputs]]) -> None:
        """Learns from (examples, base's, teacher's) how far these are apart: the base's loss is 1 in each term."""
        found = [torch.stack(self.differences(base, teacher)) for _, base, teacher in batches]
        self._scales = torch.stack(found).mean(0).tolist()
        if not all(map(math.isfinite, self._scales)):
            raise SourceError("the fine-tune gives NaN or infinity on these texts; check it, or fit in float32")
        if not any(scale > 0 for scale in self._scales):
            raise SourceError("the fine-tune behaves like its base on these texts; give texts of its own task")

    def target(self, teacher: Outputs, indices: Sequence[int]) -> Outputs:
        """What a student is trained to give: of some examples, from the teacher's outputs, which may be changed."""
        return teacher

    def weight(self, settled: float) -> float:
        """What the output weighs in the loss when so much of the way to the final mask, 0 to 1, lies behind."""
        return LAST

    def loss(self, student: Outputs, target: Outputs, last: float = LAST) -> Tensor:
        """The share of the base's difference that is left, averaged over the terms; the output weighs `last`."""
        if last == 1 and self._scales[-1] > 0:
            return self.differences(student[-1:], target[-1:])[0] / self._scales[-1]
        terms = zip(self.differences(student, target), self._scales, strict=True)
        left = torch.stack([term / scale for term, scale in terms if scale > 0])
        return last * left[-1] + (1 - last) * left.mean()

    @abstractmethod
    def distance(self, student: Outputs, teacher: Outputs) -> float:
        """What is reported."""

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]] | None:
        """Where each output's rows lie among those of all examples, and how many these are; None: nobody knows."""
        return None


class TextBehaviour(Behaviour):
    """Models of transformers: hidden states of all layers, and logits, or else the embedding of the text.

    Where it is known what the model is used for (logits, or an embedding that its folder describes), hidden states
    only guide the way: in the end nothing but the output counts, for few nonzeros cannot do both.

    Of a language model's texts the fine-tune tells more than its logits say.  A fit that is short of nonzeros stays
    behind in the direction of the fine-tune, which costs it more likelihood of the texts than the divergence tells.
    So a share of the target is the token that follows, which is no label but the text.  It is as much smaller as the
    texts are farther from what the fine-tune learnt: where it predicts them no better than the base, it is none.

    Args:
        pooling: how token vectors become an embedding; None if nobody says.
        text_share: the largest such share; of these texts, once `calibrate` has looked at them.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        model: nn.Module,
        tokens: int,
        pooling: str | None = None,
        text_share: float = 0.0,
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
        self._pooling, self.text_share = pooling, text_share
        #: Whether it is a language model: a row of logits predicts the token after its own.
        self.predicts = bool(getattr(model, "can_generate", lambda: False)())
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

    def calibrate(self, batches: Iterable[tuple[Sequence[int], Outputs, Outputs]]) -> None:
        """Also learns how much of the fine-tune is in the texts: nats that they gain, against the divergence."""
        gained: list[float] = []

        def looked_at() -> Iterator[tuple[Sequence[int], Outputs, Outputs]]:
            for indices, base, teacher in batches:
                if self.predicts:
                    gained.append(self.lost(indices, base, teacher))
                yield indices, base, teacher

        super().calibrate(looked_at())
        found = sum(gained) / len(gained) / self._scales[-1] if gained and self._scales[-1] > 0 else 0.0
        self.text_share *= min(1.0, max(0.0, found))

    def target(self, teacher: Outputs, indices: Sequence[int]) -> Outputs:
        """With a share of the probability on the token that follows."""
        if self.predicts and self.text_share > 0:
            tokens, there = self._following(indices)
            blend(teacher[-1], tokens, self.text_share * there)
        return teacher

    def weight(self, settled: float) -> float:
        """Rises to 1."""
        used = self._output == "logits" or self._pooling is not None
        return LAST + (1 - LAST) * settled if used else LAST

    def lost(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """How much less likely a language model finds the texts than the fine-tune does, in nats a token."""
        tokens, there = self._following(indices)
        theirs, own = (log_likelihoods(outputs[-1], tokens) for outputs in (teacher, student))
        return float(((theirs - own) * there).sum() / there.sum().clamp(min=1))

    def _following(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row by row of the logits, the token that follows, and 1; 0 where the text ends and the token is any."""
        places, there = self._places(indices)
        last = places + 1 == (self._starts + self._lengths)[indices][:, None]
        follows = ~last[there]
        tokens = self._ids[places[there] + follows]
        return tokens.to(self._device, non_blocking=True), follows.float().to(self._device, non_blocking=True)

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
