"""The behaviour of transformers' models on texts: hidden states, and logits or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from shiradelta.text.inputs import generates, is_seq2seq, moved
from shiradelta.text.kinds import TEXT
from shiradelta.text.pooling import pool
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows
from shiradelta.text.tokenise import tokenise
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

    EMBEDDING = HIDDEN_ERROR  # pooled from the last hidden states
    OWN_EMBEDDING = "relative error of the embeddings"  # that the model itself gives
    LOGITS = "KL divergence of the output, nats"
    LABELS = "KL divergence of the labels, nats"  # logits of independent labels, of which any number may apply


#: Weight of a prompt's token in a layer's statistics, where one that the model is to say has 1.  Answers are read from
#: what layers make of the prompt, so it counts; counting it in full keeps about 1 % less of the gain.
LEAST_WEIGHT = 0.1


class TextBehaviour(Behaviour):
    """Models of transformers: hidden states of all layers, and logits, or else the embedding of the text.

    An encoder-decoder's hidden states are those of both; its logits predict the completion.

    Matching hidden states and logits at once costs accuracy at low density.  So where the model's use is known (it has
    logits, or its folder describes the embedding), the weight of the hidden states is annealed to zero.

    Matching the logits alone loses likelihood on a language model's own texts, more than the divergence shows.  So
    part of the target is the next token of the text, which needs no label.  That part is scaled down when the texts
    differ from the fine-tune's training data; it is zero where the fine-tune predicts them no better than the base.

    Args:
        tokenizer: the model's; or its processor, where examples have more than texts.
        examples: texts, or for language models completions and conversations, or for encoders pairs, or sounds.
        model: sets limits on tokens; its configuration says what its logits are.
        tokens: longer texts are cut.
        pooling: how token vectors become an embedding; None if unknown.
        text_share: largest share of the target that is the next token; `calibrate` scales it down.
        prompt_share: weight of a prompt's token in losses and measures, where one that the model is to say has 1.

    Raises:
        SourceError: the examples are of a kind that the model cannot use, or `tokenise` refuses them.
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
        #: Whether it is a language model: a row of logits predicts a token.
        self.predicts = generates(model)
        kind = examples.kind
        suits = kind.is_text or kind.predicts is self.predicts
        if not suits and not kind.media and not is_seq2seq(model):  # `tokenise` says what these need
            raise SourceError(
                f"{type(model).__name__} {'predicts the next token' if self.predicts else 'predicts no next token'}, so"
                f" examples with {' and '.join(kind.keys)} do not suit it; give {TEXT.shape}"
            )
        self._tokenizer, self._kind = tokenizer, examples.kind
        self._inputs = tokenise(examples, tokenizer, model, tokens, prompt_share)
        self.lengths = self._inputs.lengths
        config: Any = model.config
        # A classifier on a causal model looks for the last token by its config's padding token.
        config.pad_token_id = self._inputs.pad
        multi = getattr(config, "problem_type", None) == "multi_label_classification"
        self._logits = OutputKind.LABELS if multi else OutputKind.LOGITS
        self._output = self._embedding = OutputKind.OWN_EMBEDDING if self._inputs.embeds else OutputKind.EMBEDDING
        #: The rows of each output; None where it has one for each text.
        self._rows: list[TokenRows | None] = []
        self._pooling, self.text_share = pooling, text_share

    def generate(
        self,
        model: nn.Module,
        indices: Sequence[int],
        number: int,
        batch: int,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Adds texts that a model generates from prompts of some examples; arguments are those of `generate`.

        Raises:
            SourceError: the model is no language model, or there is nothing to begin a text with.
        """
        if not self.predicts:
            raise SourceError(
                f"{type(model).__name__} is no language model and generates no texts; leave out --fit-generate"
            )
        made = generate(model, self._tokenizer, self._inputs, indices, number, batch, seed, progress)
        self._inputs.extend(made)
        self.lengths = self._inputs.lengths

    @property
    def measure(self) -> str:
        return self._output.value

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """Rows of the tokens that count, without padding; a classifier's logits and embeddings have one per text."""
        given = moved(self._inputs.arguments(indices), model)
        result = model(**given, output_hidden_states=True)
        layers = self._inputs.hidden_states(result)
        logits: Any = getattr(result, "logits", None)
        of_tokens = logits is not None and logits.dim() == 3
        every: list[tuple[Tensor, TokenRows | None]] = [*layers, *([(logits, self._inputs.rows)] if of_tokens else [])]
        kept = _beside(every, lambda rows: rows.kept(indices))
        outputs = [found.flatten(0, 1)[at] for (found, _), at in zip(every, kept, strict=True)]
        self._rows = [*(rows for _, rows in layers), self._inputs.rows if of_tokens else None]
        self._output = self._embedding if logits is None else self._logits
        if logits is None:
            outputs.append(self._embeddings(result, layers[-1][0], given, model))
        elif not of_tokens:
            outputs.append(logits)
        return outputs

    def _embeddings(self, result: Any, last: Tensor, given: Mapping[str, Any], model: nn.Module) -> Tensor:
        """Unit vectors: the model's own, or those pooled from the last hidden states."""
        if self._inputs.embeds:
            return nn.functional.normalize(self._inputs.embeddings(result).float(), dim=-1)
        return pool(last, given["attention_mask"].to(last.device), self._pooling, model)

    def check(self, model: nn.Module, base: Path) -> None:
        """Raises SourceError if examples of this kind do not run the model, or it gives no hidden states."""
        try:
            with torch.no_grad():
                self.outputs(model, [min(range(len(self.lengths)), key=self.lengths.__getitem__)])
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {brief(str(error), 160)}"
            what = "texts alone" if self._kind.is_text else " and ".join(self._kind.keys)
            raise SourceError(
                f"{base}: {what} do not run {type(model).__name__} ({why}); give model and forward from Python"
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

    def _weights(self, number: int, output: Tensor, indices: Sequence[int]) -> Tensor | None:
        """How much each row of an output counts, the one of that number; None if all count alike."""
        return _beside([(output, self._rows[number])], lambda rows: rows.weights(indices))[0]

    def token_weights(self, indices: Sequence[int], rows: int) -> Tensor | None:
        found = (one.shares(indices, LEAST_WEIGHT) for one in self._inputs.layer_rows)
        return next((shares for shares in found if len(shares) == rows), None)

    def target(self, teacher: Outputs, indices: Sequence[int]) -> Outputs:
        """The teacher's outputs, with a share of the probability moved to the next token."""
        if self.predicts and self.text_share > 0:
            tokens, there = self._following(indices, teacher[-1].device)
            blend(teacher[-1], tokens, self.text_share * there)
        return teacher

    def weight(self, settled: float) -> float:
        """Rises to 1 if the model's use is known."""
        used = self._output is not OutputKind.EMBEDDING or self._pooling is not None
        first = super().weight(settled)
        return first + (1 - first) * settled if used else first

    def lost(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """The likelihood of the texts that a language model lost against the fine-tune, in nats per token."""
        tokens, there = self._predicted(indices, student[-1])
        theirs, own = (log_likelihoods(outputs[-1], tokens) for outputs in (teacher, student))
        return float(((theirs - own) * there).sum() / there.sum().clamp(min=1e-9))

    def _following(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(the token that follows, 1) for each row of the logits; (any token, 0) at the end of a text; on a device."""
        tokens, there = self._inputs.rows.following(indices)
        return tokens.to(device, non_blocking=True), there.to(device, non_blocking=True)

    def _predicted(self, indices: Sequence[int], logits: Tensor) -> tuple[Tensor, Tensor]:
        """(the token that follows, how much it counts) for each row of the logits."""
        tokens, there = self._following(indices, logits.device)
        weights = self._weights(-1, logits, indices)
        return tokens, there if weights is None else there * weights

    def differences(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Squared errors of hidden states and embeddings, KL divergence of logits; means over rows."""
        own = zip(student, self._rows[-len(student) :], strict=True)  # of the output alone, where that is all
        weights = _beside(list(own), lambda rows: rows.weights(indices))
        found = list(zip(student, teacher, weights, strict=True))
        logits = [] if self._output is self._embedding else [found.pop()]
        terms = [weighted_mean((s.float() - t.float()).square().sum(1), counts) for s, t, counts in found]
        return terms + [self._divergence(*one) for one in logits]

    def distance(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """KL divergence of the logits, or relative error of the last hidden states, or of embeddings of the model."""
        if self._output is self._embedding:
            which = -1 if self._inputs.embeds else -2
            return _relative_error(student[which], teacher[which], None)
        return float(self._divergence(student[-1], teacher[-1], self._weights(-1, student[-1], indices)))

    def compare(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> dict[str, float]:
        found = super().compare(indices, student, teacher)
        s, t, weights = student[-1], teacher[-1], self._weights(-1, student[-1], indices)
        if self._output is self._embedding:
            found[COSINE] = float(nn.functional.cosine_similarity(s.float(), t.float()).mean())
        else:
            of_hidden = self._weights(-2, student[-2], indices)
            found[HIDDEN_ERROR] = _relative_error(student[-2], teacher[-2], of_hidden)
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
        if self._output is self._embedding:
            return AGREEMENT if self._inputs.sides == 1 else PARTNERS
        if self._rows[-1] is not None:
            return None
        return LABELS if self._output is OutputKind.LABELS else ANSWERS

    def evidence(self, indices: Sequence[int], outputs: Outputs) -> Tensor:
        """Nats and tokens; or the embeddings, or answers, of an example's texts."""
        last = outputs[-1]
        if not self.predicts:
            return torch.cat(last.float().chunk(self._inputs.sides), dim=1).cpu()
        tokens, there = self._predicted(indices, last)
        counts = self._inputs.rows.counts(indices).to(last.device)
        example = torch.arange(len(indices), device=last.device).repeat_interleave(counts)
        rows = torch.stack([-log_likelihoods(last, tokens) * there, there], dim=1)
        return torch.zeros(len(indices), 2, device=last.device).index_add_(0, example, rows).cpu()

    def _divergence(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        labels = self._output is OutputKind.LABELS
        return divergence_of_labels(student, teacher).mean() if labels else divergence(student, teacher, weights)

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        sides = self._inputs.sides
        numbers = [sides * index + side for side in range(sides) for index in indices]
        texts = torch.tensor(numbers), sides * len(self.lengths)
        ranks = {rows: rows.ranks(indices) for rows in dict.fromkeys(self._rows) if rows is not None}
        return [texts if rows is None else (ranks[rows], rows.number) for rows in self._rows]


def _beside(
    outputs: Sequence[tuple[Tensor, TokenRows | None]], of: Callable[[TokenRows], Tensor | None]
) -> list[Tensor | None]:
    """What is asked of the rows of outputs, on the device of each output.

    Args:
        outputs: with their rows; None for outputs that have no rows of tokens.
        of: what is asked, on the CPU, where nothing waits for it; each transfer of a GPU's would.
    """
    found: dict[tuple[TokenRows | None, torch.device], Tensor | None] = {}
    for output, rows in outputs:
        if (rows, output.device) not in found:
            made = None if rows is None else of(rows)
            found[rows, output.device] = None if made is None else made.to(output.device, non_blocking=True)
    return [found[rows, output.device] for output, rows in outputs]


def _relative_error(student: Tensor, teacher: Tensor, weights: Tensor | None) -> float:
    """|student - teacher| / |teacher| over all rows, of which a weight counts the square."""
    s, t = student.float(), teacher.float()
    if weights is not None:
        root = weights.sqrt()[:, None]
        s, t = s * root, t * root
    return float((s - t).norm() / t.norm())
