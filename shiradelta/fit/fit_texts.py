"""Divides the texts of a fit into texts to fit on and held-out ones, and into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from shiradelta.fit.settings import Fit
from shiradelta.text.batches import batches, split
from shiradelta.text.texts import read_texts

#: Batches for the loss's scales, for importance scores, and for the moments of the closed form.
CALIBRATION = 8


class FitTexts:
    """The texts of a fit.

    Attributes:
        every: all texts.
        train, held_out: indices of the texts to fit on, and of the held-out texts.

    Raises:
        SourceError: the texts cannot be read, or are too few.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self.every: list[Any] = read_texts(fit.texts, fit.log)
        self.train, self.held_out = split(len(self.every), fit.held_out, fit.seed)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches for the optimizer, forever; `lengths` has the tokens of every text."""
        return batches(self.train, lengths, self._fit.batch, self._fit.seed)

    def calibration(self, lengths: Sequence[int]) -> list[list[int]]:
        """The texts of a few batches, by forward pass.  None of them is held out."""
        size = self._fit.per_pass
        number = max(1, min(CALIBRATION * self._fit.batch, len(self.train)) // size)
        return list(islice(batches(self.train, lengths, size, self._fit.seed), number))
