"""Examples as token ids, and how much each token counts as something that a model is to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.conversation import rendered
from shiradelta.text.inputs import ModelInputs
from shiradelta.text.kinds import COMPLETION, MESSAGES
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows
from shiradelta.text.tokens import TokenTable, check_vocabulary, padding_token, token_limit

#: Token ids of a text, and whether the model is to say each of them.
_Said = tuple[list[int], list[bool]]


class TokenisedExamples(ModelInputs):
    """Examples of one kind as token ids, for a model that reads one text: a language model or an encoder.

    Args:
        examples: the examples.
        tokenizer: the model's.
        model: sets limits on tokens.
        tokens: longer texts are cut.
        prompt_share: weight of a prompt's token, where one that the model is to say has 1.
        trains: whether texts are trained on: their end is a token, too, and something has to follow another token.
            Completions and conversations always end.

    Attributes:
        table: the token ids; a pair is two texts, one after the other.
        lengths: tokens by example: of a pair, those of its longer text.
        weights: float32 [tokens]: how much each token of the table counts; None if all count alike.

    Raises:
        SourceError: the tokenizer does not belong to the model, it has no chat template and the examples need one, a
            text has no tokens, or an example has nothing to predict within so many tokens.
    """

    def __init__(
        self,
        examples: ExampleSet,
        tokenizer: Any,
        model: nn.Module,
        tokens: int,
        prompt_share: float = 0.0,
        trains: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._asked, self.limit = tokens, token_limit(tokens, tokenizer, model)
        self.pad = padding_token(tokenizer, model)
        self.sides = 1 if examples.kind.predicts else len(examples.kind.keys)
        self.weights: Tensor | None = None
        self._prompt_share, self._prompts = prompt_share, list[int]()
        if examples.kind.check is MESSAGES.check:
            ids = self._said([self._conversation(row[0], n) for n, row in enumerate(examples.rows, 1)], prompt_share)
        elif examples.kind is COMPLETION:
            ids = self._said(self._completions(examples.rows), prompt_share)
        else:
            ids = self._ids([text for row in examples.rows for text in row])
            ids = [self._ended(one) for one in ids] if trains else ids
        if not all(ids):
            raise SourceError("a text has no tokens; leave it out")
        check_vocabulary(max(map(max, ids)), model)
        self._lay_out(ids)
        if trains:
            self._check_predicted()

    def _lay_out(self, ids: Sequence[Sequence[int]]) -> None:
        self.table = TokenTable(ids)
        self.lengths = [max(own) for own in zip(*[iter(self.table.lengths)] * self.sides, strict=True)]
        self.rows = TokenRows.of_next(self.table, self.weights, self.sides)

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        ids, there = self.table.padded(self.rows.texts(indices), self.pad)
        return {"input_ids": ids, "attention_mask": there.long()}

    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        layers = getattr(result, "hidden_states", None)
        if layers is not None:
            return [(hidden, self.rows) for hidden in layers[1:]]
        # A classifier of an encoder-decoder's: its decoder reads the same text.
        both = (*result.encoder_hidden_states[1:], *result.decoder_hidden_states[1:])
        return [(hidden, self.rows) for hidden in both]

    def row(self, index: int) -> tuple[list[int], int]:
        """(token ids of an example that is one text, how many of these are before the first that a model is to say)."""
        return self.table.row(index), self._prompts[index] if self._prompts else 0

    def extend(self, rows: Sequence[tuple[Sequence[int], int]]) -> None:
        """Adds examples, each (token ids of a text, how many of these are its prompt), after the others."""
        if self.weights is not None:
            shares = [self._prompt_share if at < prompt else 1.0 for ids, prompt in rows for at in range(len(ids))]
            self.weights = torch.cat([self.weights, torch.tensor(shares)])
        if self._prompts:
            self._prompts += [prompt for _, prompt in rows]
        self._lay_out([*(self.row(index)[0] for index in range(len(self.lengths))), *(ids for ids, _ in rows)])

    def _check_predicted(self) -> None:
        """Raises SourceError if an example is so short that no token of it follows another."""
        for number, length in enumerate(self.lengths, 1):
            if length < 2:
                raise nothing_to_predict(number, self.limit, self._asked)

    def _said(self, found: Sequence[_Said], prompt_share: float) -> list[list[int]]:
        """The ids of texts, cut; sets the weights.  The first token has nothing before it to predict it from."""
        cut = [(ids[: self.limit], said[: self.limit]) for ids, said in found]
        for number, (_, said) in enumerate(cut, 1):
            if not any(said[1:]):
                raise nothing_to_predict(number, self.limit, self._asked)
        self._prompts = [said.index(True) for _, said in cut]
        if prompt_share < 1:
            self.weights = torch.tensor([1.0 if one else prompt_share for _, said in cut for one in said])
        return [ids for ids, _ in cut]

    def _completions(self, rows: Sequence[Sequence[str]]) -> list[_Said]:
        # One token more than fits, so that a prompt that is too long leaves no room for the completion.
        longest = {"max_length": self.limit + 1}
        prompts = [self._open(ids) for ids in self._ids([prompt for prompt, _ in rows], **longest)]
        completions = self._ids([completion for _, completion in rows], add_special_tokens=False)
        pairs = [
            (prompt, self._ended([*prompt, *completion]))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))) for prompt, ids in pairs]

    def _conversation(self, messages: Any, number: int) -> _Said:
        text, spans = rendered(messages, self._tokenizer, f"example {number}")
        if not getattr(self._tokenizer, "is_fast", False):
            raise SourceError(
                "the tokenizer does not say where its tokens are, which messages need; give prompt and completion, or"
                " the folder's tokenizer.json"
            )
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token counts if its last character is the assistant's: some begin with the space before it.
        said = [any(start < last <= end for start, end in spans) for _, last in found["offset_mapping"]]
        return found["input_ids"], said

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        cut = {"truncation": True, "max_length": self.limit, **options}
        found: list[list[int]] = self._tokenizer(list(texts), **cut)["input_ids"]
        return found

    def _open(self, ids: list[int]) -> list[int]:
        """A prompt without the end that some tokenizers put there."""
        return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] else ids

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or len(ids) >= self.limit or ids[-1:] == [end] else [*ids, end]


def nothing_to_predict(number: int, limit: int, asked: int) -> SourceError:
    """The error of an example that is cut so short that nothing in it is predicted, at less than was asked perhaps."""
    more = "give a larger --tokens (--fit-tokens of convert)"
    if limit < asked:
        more = "shorten its prompt: the model or its tokenizer takes no more"
    return SourceError(f"example {number} has nothing to predict within {limit} tokens; leave it out, or {more}")
