"""Reads the examples of a fit, and divides them into those to fit on and held-out ones, and into batches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from shiradelta.errors import SourceError
from shiradelta.fit.settings import Fit
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.models.processors import load_processor
from shiradelta.text.batches import batches, by_length, split
from shiradelta.text.read import ExampleSet, check_number, read_file, read_list
from shiradelta.util.progress import Progress

#: Batches for the loss's scales, for importance scores, and for the moments of the closed form.
CALIBRATION = 8


class FitTexts:
    """The examples of a fit.

    Attributes:
        every: each example as the user's own `forward` gets it.
        train, held_out: indices of the examples to fit on, and of the held-out ones.  Those of generated texts come
            after all others.

    Raises:
        SourceError: the examples cannot be read, or are too few.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._examples = _read(fit)
        self.every: list[Any] = [*fit.texts] if self._examples is None else self._examples.plain  # type: ignore[misc]
        check_number(len(self.every), "the examples to fit on")
        self.train, self.held_out = split(len(self.every), fit.held_out, fit.seed)

    @property
    def media(self) -> str:
        """What the examples have beside texts (`ExampleKind.media`)."""
        return "" if self._examples is None else self._examples.kind.media

    @property
    def identity(self) -> list[str]:
        """What tells the examples from others: as in 0.1, each as a text; of files, what they hold."""
        held = self._examples.identity if self._examples is not None and self.media else self.every
        return [str(one) for one in held]

    def processor(self, *folders: Path) -> Any:
        """What makes a model's inputs of the examples; arguments and errors are those of `load_processor`."""
        return load_processor(self.media, *folders)

    def behaviour(self, tokenizer: Any, model: nn.Module, pooling: str | None) -> TextBehaviour:
        """The behaviour of transformers' models on the examples.

        Raises:
            SourceError: the examples are neither texts nor of a kind that files have, or do not suit the model.
        """
        fit = self._fit
        if self._examples is None:
            raise SourceError("examples have to be strings, or objects as in a file; others need `forward`")
        return TextBehaviour(tokenizer, self._examples, model, fit.tokens, pooling, fit.text_share, fit.prompt_share)

    def generate(self, behaviour: TextBehaviour, model: nn.Module, progress: Progress) -> None:
        """Adds texts to fit on that the model generates, as many as the settings say; errors are the behaviour's."""
        fit, what = self._fit, "texts of the fine-tune"
        behaviour.generate(model, self.train, fit.generate, fit.per_pass, fit.seed, partial(progress, what))
        self.train = [*self.train, *range(len(self.every), len(self.every) + fit.generate)]

    def numbers(self, indices: Iterable[int]) -> tuple[int, int]:
        """How many of some texts are examples, and how many are generated."""
        generated = [index >= len(self.every) for index in indices]
        return len(generated) - sum(generated), sum(generated)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches for the optimizer, forever; `lengths` has the tokens of every text."""
        return batches(self.train, lengths, self._fit.batch, self._fit.seed)

    def calibration(self, lengths: Sequence[int]) -> list[list[int]]:
        """The texts of a few batches, by forward pass.  None of them is held out."""
        count = min(CALIBRATION * self._fit.batch, len(self.train))
        passes = -(-count // self._fit.per_pass)
        taken = random.Random(self._fit.seed).sample(self.train, count)
        return by_length(taken, lengths, -(-count // passes))


def _read(fit: Fit) -> ExampleSet | None:
    """The examples of a file, or of a list; None for a list of other things, which only `forward` can read."""
    if not isinstance(fit.texts, str | os.PathLike):
        return None if fit.forward is not None else read_list([*fit.texts])
    path = os.fspath(fit.texts)

    def skipped(count: int) -> None:
        fit.log(f"{path}: {count} blank {'text' if count == 1 else 'texts'} skipped")

    return read_file(path, skipped=skipped)
