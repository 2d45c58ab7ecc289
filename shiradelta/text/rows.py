"""Rows that a model gives for tokens of a padded batch: which count, how much, and what each predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shiradelta.text.tokens import TokenTable


class TokenRows:
    """Rows of a model's hidden states or logits, one for each token of the texts that it gets.

    A batch is padded on the right, and its rows are those of the flattened batch [texts x tokens].

    Args:
        table: the texts.
        labels: int64 [tokens of the table]: the token that each row predicts.
        predicts: float32 [tokens of the table]: 1 where a row predicts a token, 0 where it predicts none.
        weights: float32 [tokens of the table]: how much each row counts; None if all count alike.
        sides: texts of an example, one after the other in the table.
        unlike: texts of the same examples that batches are never padded as far as; None if there are no others.

    Attributes:
        table: the texts.
        number: rows that count, of all texts.
    """

    def __init__(
        self,
        table: TokenTable,
        labels: Tensor,
        predicts: Tensor,
        weights: Tensor | None = None,
        sides: int = 1,
        unlike: TokenTable | None = None,
    ) -> None:
        self.table = table
        self._labels, self._predicts, self._weights, self._sides = labels, predicts, weights, sides
        self._unlike = unlike
        counts = torch.ones(len(table.ids)) if weights is None else weights
        #: Index of each token among those whose rows count.
        self._rank = (counts > 0).cumsum(0) - 1
        self.number = int(self._rank[-1]) + 1

    @classmethod
    def of_next(
        cls, table: TokenTable, weights: Tensor | None = None, sides: int = 1, unlike: TokenTable | None = None
    ) -> TokenRows:
        """Rows that predict the token after their own; the last row of a text predicts nothing.

        Args:
            table: the texts.
            weights: float32 [tokens of the table]: how much each token counts as one that is predicted.
            sides: texts of an example.
            unlike: texts of the same examples that batches are never padded as far as.
        """
        last = table.ends(range(len(table.lengths))) - 1
        predicts = torch.ones(len(table.ids))
        predicts[last] = 0
        shifted = None if weights is None else torch.cat([weights[1:], weights.new_zeros(1)]) * predicts
        return cls(table, torch.cat([table.ids[1:], table.ids[:1]]), predicts, shifted, sides, unlike)

    @classmethod
    def of_labels(cls, table: TokenTable, weights: Tensor | None = None, unlike: TokenTable | None = None) -> TokenRows:
        """Rows of a decoder that gets labels shifted by one, so that each row predicts its own label in the table."""
        return cls(table, table.ids, torch.ones(len(table.ids)), weights, unlike=unlike)

    def texts(self, indices: Sequence[int]) -> list[int]:
        """The texts of some examples, by their number in the table; of pairs, first the anchors."""
        return [self._sides * index + side for side in range(self._sides) for index in indices]

    def width(self, indices: Sequence[int]) -> int:
        """Tokens that a batch is padded to."""
        longest, *others = (
            max(table.lengths[text] for text in self.texts(indices))
            for table in (self.table, self._unlike)
            if table is not None
        )
        return longest + (longest in others)

    def _padded(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `TokenTable.slots`, of the texts of some examples."""
        return self.table.slots(self.texts(indices), self.width(indices))

    def _counted(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(slots of a padded batch, which of them count), as `TokenTable.slots`."""
        slots, there = self._padded(indices)
        if self._weights is not None:
            there = there & (self._weights[torch.where(there, slots, 0)] > 0)
        return slots, there

    def _slots(self, indices: Sequence[int]) -> Tensor:
        """Index into the table of each row that counts."""
        slots, kept = self._counted(indices)
        return slots[kept]

    def kept(self, indices: Sequence[int]) -> Tensor:
        """Index of each row that counts among those of the padded batch [texts x tokens]."""
        return self._counted(indices)[1].flatten().nonzero()[:, 0]

    def counts(self, indices: Sequence[int]) -> Tensor:
        """How many rows count of each text [texts]."""
        return self._counted(indices)[1].sum(1)

    def ranks(self, indices: Sequence[int]) -> Tensor:
        """Index of each row that counts among those of all texts."""
        return self._rank[self._slots(indices)]

    def weights(self, indices: Sequence[int]) -> Tensor | None:
        """How much each row counts of those that do; None if all count alike."""
        return None if self._weights is None else self._weights[self._slots(indices)]

    def following(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(the token that is predicted, 1) for each row that counts; (any token, 0) where none is."""
        slots = self._slots(indices)
        return self._labels[slots], self._predicts[slots]

    def shares(self, indices: Sequence[int], least: float) -> Tensor:
        """How much each row of a padded batch counts [texts x tokens], padding 0 and others at least so much."""
        slots, there = self._padded(indices)
        counts = there.float()
        if self._weights is not None:
            counts *= least + (1 - least) * self._weights[torch.where(there, slots, 0)]
        return counts.flatten()


class WindowRows(TokenRows):
    """Rows of an encoder that always gets a window of the same length, whose beginning counts.

    Args:
        filled: rows that count of each example.
        window: rows of the window.
    """

    def __init__(self, filled: Sequence[int], window: int) -> None:
        table = TokenTable([[0] * count for count in filled])
        super().__init__(table, table.ids, torch.zeros(len(table.ids)))
        self._window = window

    def width(self, indices: Sequence[int]) -> int:
        return self._window

    def shares(self, indices: Sequence[int], least: float) -> Tensor:
        """As of any rows; silence after the sound is read, too, so it counts the least."""
        return super().shares(indices, least).clamp(min=least)
