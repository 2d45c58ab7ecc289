"""The labels that an encoder-decoder's decoder predicts, and what the decoder gets for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.rows import TokenRows
from shiradelta.text.tokens import TokenTable, padding_token

#: Token ids of a text, and which of them count.
Label = tuple[Sequence[int], Sequence[bool]]


class Labels:
    """Texts that a decoder predicts, as token ids.

    The decoder gets them shifted right, as the model itself shifts them.  All of their tokens count, special ones too.
    A text that is cut has no end that counts.

    Args:
        tokenizer: the model's.
        model: an encoder-decoder, which says how labels are shifted.
        limit: longer texts are cut to so many tokens.

    Attributes:
        table: the token ids; empty until `lay_out`.
        rows: the decoder's rows, each of which predicts its own label.
        pad: the token to pad with.

    Raises:
        SourceError: nothing says what the decoder starts with.
    """

    table: TokenTable
    rows: TokenRows

    def __init__(self, tokenizer: Any, model: nn.Module, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self.pad = padding_token(tokenizer, model)
        self._shift = _Shift(model)
        self._special = set(tokenizer.all_special_ids)

    def of_texts(self, texts: Sequence[str]) -> list[Label]:
        """Each text with the special tokens that the tokenizer gives to a target."""
        whole = self._tokenizer(text_target=list(texts))["input_ids"]
        cut = self._tokenizer(text_target=list(texts), truncation=True, max_length=self._limit)["input_ids"]
        return [self._ended(own, len(every) > len(own)) for every, own in zip(whole, cut, strict=True)]

    def of_turns(self, texts: Sequence[str]) -> list[Label]:
        """Turns of conversations, whose special tokens the chat template has written."""
        found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [(ids[: self._limit], [True] * min(len(ids), self._limit)) for ids in found]

    def _ended(self, ids: list[int], is_cut: bool) -> Label:
        """A text with its end, which does not count where the text is cut."""
        end = self._tokenizer.eos_token_id
        if ids[:1] == [self._shift.start]:  # shifting puts it there
            ids = ids[1:]
        if is_cut:
            kept = next((at for at in range(len(ids), 0, -1) if ids[at - 1] not in self._special), 0)
            return ids, [at < kept for at in range(len(ids))]
        if end is not None and end not in ids[-2:] and len(ids) < self._limit:  # after it may be a language
            ids = [*ids, end]
        return ids, [True] * len(ids)

    def lay_out(self, labels: Sequence[Label], unlike: TokenTable | None = None) -> None:
        """Takes the labels of all examples.

        Args:
            labels: as of `of_texts` or `of_turns`.
            unlike: texts of the same examples, to whose width labels are never padded.

        Raises:
            SourceError: a text has no token that counts.
        """
        if not all(any(counts) for _, counts in labels):
            raise SourceError("a text has no tokens; leave it out")
        self.table = TokenTable([ids for ids, _ in labels])
        self._given = TokenTable([self._shift.of(ids) for ids, _ in labels])
        weights = torch.tensor([float(one) for _, counts in labels for one in counts])
        self.rows = TokenRows.of_labels(self.table, None if weights.all() else weights, unlike)
        self._labels = list(labels)

    def every(self) -> list[Label]:
        """The labels of all examples."""
        return [*self._labels]

    def given(self, indices: Sequence[int]) -> Tensor:
        """Token ids that the decoder gets of a batch [texts, tokens].

        Padding follows what it pads, so a causal decoder needs no mask of it.
        """
        return self._given.padded(indices, self.pad, self.rows.width(indices))[0]

    def start(self, index: int) -> list[int]:
        """What the decoder gets of a text before its first token that is not special, its start included.

        Raises:
            SourceError: the decoder starts with the token that ends the text, which is unknown before.
        """
        if self._shift.start is None:
            raise SourceError(
                "the decoder begins with the token that its text ends with, so no text can be generated; leave out"
                " --fit-generate (generate=)"
            )
        ids = self.table.row(index)
        first = next((at for at, token in enumerate(ids) if token not in self._special), 0)
        return [self._shift.start, *ids[:first]]


class _Shift:
    """Shifts labels right, as a model does.

    Attributes:
        start: the token that every completion begins after; None where it is the completion's last, as in mBART.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        one, other = self.of([5, 6]), self.of([5, 7])
        self.start = one[0] if one[0] == other[0] else None

    def of(self, labels: Sequence[int]) -> list[int]:
        """What the decoder gets where it is to predict these labels."""
        own = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if own is None:
            return [self._known_start(), *labels[:-1]]
        try:
            with torch.no_grad():
                found: list[int] = own(torch.tensor([labels]))[0].tolist()
        except (AttributeError, TypeError, ValueError):
            found = [self._known_start(), *labels[:-1]]
        return found

    def _known_start(self) -> int:
        for config in (self._model.config, getattr(self._model, "generation_config", None)):
            if (start := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(start)
        raise SourceError(
            f"{type(self._model).__name__} does not say what its decoder starts with; write decoder_start_token_id into"
            " its config.json"
        )
