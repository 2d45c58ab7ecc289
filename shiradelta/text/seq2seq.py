"""Examples for an encoder-decoder: prompts for its encoder, and completions that its decoder predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.conversation import rendered
from shiradelta.text.inputs import ModelInputs
from shiradelta.text.kinds import ASSISTANT, COMPLETION, MESSAGES
from shiradelta.text.labels import Label, Labels
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows
from shiradelta.text.tokens import TokenTable, check_vocabulary, side_limits


class Seq2SeqExamples(ModelInputs):
    """Prompts and completions as token ids; a completion is what the decoder predicts (`Labels`).

    Args:
        examples: completions, or conversations, whose last turn is the completion.
        tokenizer: the model's.
        model: an encoder-decoder, which says how labels are shifted, and sets limits on tokens.
        tokens: longer prompts, and longer completions, are cut.
        prompt_share: has to be 0: a prompt's tokens are not predicted.

    Attributes:
        sources: the prompts' token ids.

    Raises:
        SourceError: the examples are of another kind, `prompt_share` is not 0, the tokenizer does not belong to the
            model, or has no chat template and the examples need one, or a text has no tokens.
    """

    def __init__(
        self, examples: ExampleSet, tokenizer: Any, model: nn.Module, tokens: int, prompt_share: float = 0.0
    ) -> None:
        kind, name = examples.kind, type(model).__name__
        if kind is not COMPLETION and kind.check is not MESSAGES.check:
            raise SourceError(
                f"{name} reads one text and writes another, so examples with {' and '.join(kind.keys)} do not"
                f" suit it; give {COMPLETION.shape}"
            )
        if prompt_share:
            raise SourceError(f"{name} predicts no token of a prompt; leave the prompt share out")
        self._tokenizer = tokenizer
        self._source_limit, self.limit = side_limits(tokens, tokenizer, model)
        self._said = Labels(tokenizer, model, self.limit)
        self.pad = self._said.pad
        if kind is COMPLETION:
            prompts, completions = ([row[side] for row in examples.rows] for side in (0, 1))
            sources, labels = self._ids(prompts), self._said.of_texts(completions)
        else:
            turns = [self._turns(row[0], f"example {number}") for number, row in enumerate(examples.rows, 1)]
            # The template has written all special tokens.
            sources = self._ids([before for before, _ in turns], add_special_tokens=False)
            labels = self._said.of_turns([own for _, own in turns])
        if not all(sources):
            raise SourceError("a text has no tokens; leave it out")
        check_vocabulary(max(map(max, [*sources, *(ids for ids, _ in labels if ids)])), model)
        self._lay_out(sources, labels)

    def _lay_out(self, sources: Sequence[Sequence[int]], labels: Sequence[Label]) -> None:
        self.sources = TokenTable(sources)
        # Of another width than the prompts, so that the two sides' rows in a layer are told apart by their number.
        self._said.lay_out(labels, unlike=self.sources)
        self.rows, self._source_rows = self._said.rows, TokenRows.of_next(self.sources)
        self.lengths = [sum(pair) for pair in zip(self.sources.lengths, self.labels.lengths, strict=True)]

    @property
    def labels(self) -> TokenTable:
        """The completions' token ids."""
        return self._said.table

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        ids, there = self.sources.padded(indices, self.pad)
        given = self._said.given(indices)
        return {"input_ids": ids, "attention_mask": there.long(), "decoder_input_ids": given, "use_cache": False}

    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        encoder = [(hidden, self._source_rows) for hidden in result.encoder_hidden_states[1:]]
        return encoder + [(hidden, self.rows) for hidden in result.decoder_hidden_states[1:]]

    @property
    def layer_rows(self) -> Sequence[TokenRows]:
        return [self.rows, self._source_rows]

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """(token ids of a prompt, those of its completion)."""
        return self.sources.row(index), self.labels.row(index)

    def start(self, index: int) -> list[int]:
        """As `Labels.start`, of an example's completion."""
        return self._said.start(index)

    def extend(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Adds examples, each (token ids of a prompt, those of its completion), after the others."""
        sources = [*(self.sources.row(index) for index in range(len(self.lengths))), *(source for source, _ in rows)]
        self._lay_out(sources, [*self._said.every(), *((ids, [True] * len(ids)) for _, ids in rows)])

    def _turns(self, messages: Any, where: str) -> tuple[str, str]:
        """(a conversation up to its last turn, its last turn) as texts."""
        if messages[-1]["role"] != ASSISTANT:
            raise SourceError(f"{where}: does not end with what the {ASSISTANT} says, which is predicted; cut it there")
        text, spans = rendered(messages, self._tokenizer, where)
        start, end = spans[-1]
        return text[:start], text[start:end]

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        cut = {"truncation": True, "max_length": self._source_limit}
        found: list[list[int]] = self._tokenizer(list(texts), **cut, **options)["input_ids"]
        return found
