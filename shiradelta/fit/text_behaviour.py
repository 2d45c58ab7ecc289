"""The behaviour of transformers' models on texts: hidden states, and logits or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.behaviour import Behaviour, Outputs
from shiradelta.fit.divergence import blend, divergence, divergence_of_labels, log_likelihoods, weighted_mean
from shiradelta.fit.generate import generate
from shiradelta.fit.losses import AGREEMENT, ANSWERS, LABELS, LIKELIHOOD, PARTNERS, ExampleLoss
from shiradelta.models.sentence import modules_not_run
from shiradelta.text.pooling import pool
from shiradelta.text.read import ExampleSet
from shiradelta.text.tokenised import TokenisedExamples
from shiradelta.util.text import brief

COSINE = "cosine of embeddings"
HIDDEN_ERROR = "relative error of hidden states"
EQUAL_ANSWERS = "share of equal answers"
LIKELIHOOD_LOST = "likelihood lost on the texts, nats"


def not_run(*folders: Path) -> list[str]:
    """The warning of modules of sentence-transformers' that a fit on texts does not run."""
    modules = modules_not_run(*folders)
    listed = ", ".join(modules)
    return [f"the fit does not run {listed}: its distances are those of the embeddings before"] if modules else []


class OutputKind(Enum):
    """The kind of a model's last output; the value names the measure of its distance."""

    EMBEDDING = HIDDEN_ERROR
    LOGITS = "KL divergence of the output, nats"
    LABELS = "KL divergence of the labels, nats"  # logits of independent labels, of which any number may apply


#: Weight of a prompt's token in a layer's statistics, where one that the model is to say has 1.  Answers are read from
#: what layers make of the prompt, so it counts; counting it in full keeps about 1 % less of the gain.
LEAST_WEIGHT = 0.1


class TextBehaviour(Behaviour):
    """Models of transformers: hidden states of all layers, and logits, or else the embedding of the text.

    Matching hidden states and logits at once costs accuracy at low density.  So where the model's use is known (it has
    logits, or its folder describes the embedding), the weight of the hidden states is annealed to zero.

    Matching the logits alone loses likelihood on a language model's own texts, more than the divergence shows.  So
    part of the target is the next token of the text, which needs no label.  That part is scaled down when the texts
    differ from the fine-tune's training data; it is zero where the fine-tune predicts them no better than the base.

    Args:
        tokenizer: the model's.
        examples: texts, or for language models completions and conversations, or for encoders pairs.
        model: sets limits on tokens; its configuration says what its logits are.
        tokens: longer texts are cut.
        pooling: how token vectors become an embedding; None if unknown.
        text_share: largest share of the target that is the next token; `calibrate` scales it down.
        prompt_share: weight of a prompt's token in losses and measures, where one that the model is to say has 1.

    Raises:
        SourceError: the examples are of a kind that the model cannot use, or `TokenisedExamples` refuses them.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: ExampleSet,
        model: nn.Module,
        tokens: int,
        pooling: str | None = None,
        text_share: float = 0.0,
        prompt_share: float = 0.0,
    ) -> None:
        super().__init__()
        #: Whether it is a language model: a row of logits predicts the token that follows its own.
        self.predicts = bool(getattr(model, "can_generate", lambda: False)())
        if not examples.kind.is_text and examples.kind.predicts is not self.predicts:
            raise SourceError(
                f"{type(model).__name__} {'predicts the next token' if self.predicts else 'predicts no next token'}, so"
                f' {" and ".join(examples.kind.keys)} are no examples for it; give {{"text": ...}}'
            )
        self._tokenizer = tokenizer
        self._examples = TokenisedExamples(examples, tokenizer, model, tokens, prompt_share)
        self._lay_out()
        config: Any = model.config
        # A classifier on a causal model looks for the last token by its config's padding token.
        config.pad_token_id = self._examples.pad
        multi = getattr(config, "problem_type", None) == "multi_label_classification"
        self._logits = OutputKind.LABELS if multi else OutputKind.LOGITS
        self._output = OutputKind.EMBEDDING
        self._per_token: list[bool] = []
        self._device = next(model.parameters()).device
        self._pooling, self.text_share = pooling, text_share

    def _lay_out(self) -> None:
        found = self._examples
        self._table, self.lengths = found.table, found.lengths
        self._row_weights = found.row_weights()
        counts = torch.ones(len(found.table.ids)) if self._row_weights is None else self._row_weights
        #: Index of each token among those that count.
        self._rank = (counts > 0).cumsum(0) - 1

    def generate(
        self,
        model: nn.Module,
        indices: Sequence[int],
        number: int,
        batch: int,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Adds texts that a model generates from prompts of some examples; arguments are those of `generate.generate`.

        Raises:
            SourceError: the model is no language model, or there is nothing to begin a text with.
        """
        if not self.predicts:
            raise SourceError(
                f"{type(model).__name__} is no language model and generates no texts; leave out --fit-generate"
            )
        self._examples.extend(generate(model, self._tokenizer, self._examples, indices, number, batch, seed, progress))
        self._lay_out()

    @property
    def measure(self) -> str:
        return self._output.value

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Rows of the tokens that count, without padding; a classifier's logits and embeddings have one per text."""
        # Made on the CPU, where nothing waits for it; each transfer and each mask used as an index on a GPU would.
        ids, there = self._table.padded(self._examples.texts(indices), self._examples.pad)
        kept = self._counted(indices)[1].flatten().nonzero()[:, 0]
        ids, mask, kept = (t.to(self._device, non_blocking=True) for t in (ids, there.long(), kept))
        result = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        rows = [hidden.flatten(0, 1)[kept] for hidden in result.hidden_states[1:]]
        self._per_token = [True] * len(rows)
        logits = getattr(result, "logits", None)
        if logits is None:
            self._output = OutputKind.EMBEDDING
            rows.append(pool(result.hidden_states[-1], mask, self._pooling, model))
        else:
            self._output = self._logits
            rows.append(logits.flatten(0, 1)[kept] if logits.dim() == 3 else logits)
        self._per_token.append(logits is not None and logits.dim() == 3)
        return rows

    def check(self, model: nn.Module, base: Path) -> None:
        """Raises SourceError if texts alone do not run the model, or it gives no hidden states."""
        try:
            with torch.no_grad():
                self.outputs(model, [min(range(len(self.lengths)), key=self.lengths.__getitem__)])
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {brief(str(error), 160)}"
            raise SourceError(
                f"{base}: texts alone do not run {type(model).__name__} ({why}); give model and forward from Python"
            ) from error

    def calibrate(self, batches: Iterable[tuple[Sequence[int], Outputs, Outputs]]) -> None:
        """Also scales `text_share` by the likelihood that the fine-tune gained on the texts, over the divergence."""
        gained: list[float] = []

        def observed() -> Iterator[tuple[Sequence[int], Outputs, Outputs]]:
            for indices, base, teacher in batches:
                if self.predicts:
                    gained.append(self.lost(indices, base, teacher))
                yield indices, base, teacher

        super().calibrate(observed())
        found = sum(gained) / len(gained) / self._scales[-1] if gained and self._scales[-1] > 0 else 0.0
        self.text_share *= min(1.0, max(0.0, found))

    def _counted(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(slots of a padded batch, which of them count), as `TokenTable.slots`."""
        slots, there = self._table.slots(self._examples.texts(indices))
        if self._row_weights is not None:
            there = there & (self._row_weights[torch.where(there, slots, 0)] > 0)
        return slots, there

    def _weights(self, indices: Sequence[int]) -> Tensor | None:
        """How much each row counts; None if all count alike."""
        if self._row_weights is None:
            return None
        slots, kept = self._counted(indices)
        return self._row_weights[slots[kept]].to(self._device, non_blocking=True)

    def token_weights(self, indices: Sequence[int]) -> Tensor:
        slots, there = self._table.slots(self._examples.texts(indices))
        counts = there.float()
        if self._row_weights is not None:
            counts *= LEAST_WEIGHT + (1 - LEAST_WEIGHT) * self._row_weights[torch.where(there, slots, 0)]
        return counts.flatten().to(self._device, non_blocking=True)

    def target(self, teacher: Outputs, indices: Sequence[int]) -> Outputs:
        """The teacher's outputs, with a share of the probability moved to the next token."""
        if self.predicts and self.text_share > 0:
            tokens, there = self._following(indices)
            blend(teacher[-1], tokens, self.text_share * there)
        return teacher

    def weight(self, settled: float) -> float:
        """Rises to 1 if the model's use is known."""
        used = self._output is not OutputKind.EMBEDDING or self._pooling is not None
        first = super().weight(settled)
        return first + (1 - first) * settled if used else first

    def lost(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """The likelihood of the texts that a language model lost against the fine-tune, in nats per token."""
        tokens, there = self._following(indices)
        if (weights := self._weights(indices)) is not None:
            there = there * weights
        theirs, own = (log_likelihoods(outputs[-1], tokens) for outputs in (teacher, student))
        return float(((theirs - own) * there).sum() / there.sum().clamp(min=1e-9))

    def _following(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(next token, 1) for each row of the logits; (any token, 0) at the end of a text."""
        slots, kept = self._counted(indices)
        last = slots + 1 == self._table.ends(self._examples.texts(indices))[:, None]
        follows = ~last[kept]
        tokens = self._table.ids[slots[kept] + follows]
        return tokens.to(self._device, non_blocking=True), follows.float().to(self._device, non_blocking=True)

    def differences(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Squared errors of hidden states and embeddings, KL divergence of logits; means over rows."""
        pairs = list(zip(student, teacher, strict=True))
        logits = [] if self._output is OutputKind.EMBEDDING else [pairs.pop()]
        weights = self._weights(indices)
        terms = [weighted_mean((s.float() - t.float()).square().sum(1), weights) for s, t in pairs]
        return terms + [self._divergence(s, t, weights) for s, t in logits]

    def distance(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """KL divergence of the logits, or relative error of the last hidden states."""
        if self._output is OutputKind.EMBEDDING:
            return _relative_error(student[-2], teacher[-2], None)
        return float(self._divergence(student[-1], teacher[-1], self._weights(indices)))

    def compare(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> dict[str, float]:
        found = super().compare(indices, student, teacher)
        s, t, weights = student[-1], teacher[-1], self._weights(indices)
        if self._output is OutputKind.EMBEDDING:
            found[COSINE] = float(nn.functional.cosine_similarity(s.float(), t.float()).mean())
        else:
            found[HIDDEN_ERROR] = _relative_error(student[-2], teacher[-2], weights)
            if self._output is OutputKind.LABELS:
                found[EQUAL_ANSWERS] = float(((s > 0) == (t > 0)).float().mean())
            elif s.shape[-1] > 1:  # a single output is a regression's
                found[EQUAL_ANSWERS] = float(weighted_mean((s.argmax(-1) == t.argmax(-1)).float(), weights))
        if self.predicts:
            found[LIKELIHOOD_LOST] = self.lost(indices, student, teacher)
        return found

    @property
    def example_loss(self) -> ExampleLoss | None:
        """The examples' own where they tell it, or else how far they are from the fine-tune's; None by token."""
        if self.predicts:
            return LIKELIHOOD
        if self._output is OutputKind.EMBEDDING:
            return AGREEMENT if self._examples.sides == 1 else PARTNERS
        if self._per_token[-1]:
            return None
        return LABELS if self._output is OutputKind.LABELS else ANSWERS

    def evidence(self, indices: Sequence[int], outputs: Outputs) -> Tensor:
        """Nats and tokens; or the embeddings, or answers, of an example's texts."""
        last = outputs[-1]
        if not self.predicts:
            return torch.cat(last.float().chunk(self._examples.sides), dim=1).cpu()
        tokens, there = self._following(indices)
        if (weights := self._weights(indices)) is not None:
            there = there * weights
        counts = self._counted(indices)[1].sum(1).to(last.device)
        example = torch.arange(len(indices), device=last.device).repeat_interleave(counts)
        rows = torch.stack([-log_likelihoods(last, tokens) * there, there], dim=1)
        return torch.zeros(len(indices), 2, device=last.device).index_add_(0, example, rows).cpu()

    def _divergence(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        labels = self._output is OutputKind.LABELS
        return divergence_of_labels(student, teacher).mean() if labels else divergence(student, teacher, weights)

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        slots, kept = self._counted(indices)
        texts = torch.tensor(self._examples.texts(indices))
        of_tokens = self._rank[slots[kept]].to(self._device, non_blocking=True), int(self._rank[-1]) + 1
        of_texts = texts.to(self._device, non_blocking=True), len(self._table.lengths)
        return [of_tokens if per_token else of_texts for per_token in self._per_token]


def _relative_error(student: Tensor, teacher: Tensor, weights: Tensor | None) -> float:
    """|student - teacher| / |teacher| over all rows, of which a weight counts the square."""
    s, t = student.float(), teacher.float()
    if weights is not None:
        root = weights.sqrt()[:, None]
        s, t = s * root, t * root
    return float((s - t).norm() / t.norm())
