"""Whether a delta fits a base, or is a successor of the deltas that are on it (spec/FORMAT.md, 6.4)."""

from __future__ import annotations

from typing import NamedTuple

from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format.delta import TensorDelta
from shiradelta.format.record import Record
from shiradelta.models.compatibility import Remedies, check_fingerprint


class StackWords(NamedTuple):
    """How messages speak of a place with deltas on it.

    Attributes:
        deltas: what is on it: "the deltas on the folder".
        remedies: if the base is the only reading.
        restack: how to get other deltas beneath a delta that fits neither reading.
        strength: how to give strength 1.
    """

    deltas: str
    remedies: Remedies
    restack: str
    strength: str


class StackFit:
    """Tells, tensor by tensor, what a delta was made for: the base, or the present weights.

    Args:
        label: the delta's name, for messages.
        words: the place, for messages.
        stacked: whether there are deltas on the base; otherwise base and present are the same.
        strength: alpha.
    """

    def __init__(self, label: str, words: StackWords, stacked: bool, strength: float = 1) -> None:
        self._label, self._words, self._stacked, self._strength = label, words, stacked, strength
        self._misses_base: str | None = None
        self._misses_present: str | None = None

    @property
    def is_successor(self) -> bool:
        """Whether it fits the present weights only."""
        return self._misses_base is not None

    @property
    def fits_present(self) -> bool:
        """Whether there are deltas on the base, and it fits what they give."""
        return self._stacked and self._misses_present is None

    def check(self, name: str, delta: TensorDelta | Record, base: int, present: int) -> None:
        """Compares one tensor's fingerprints with the one in the delta.

        Args:
            name: the tensor's name.
            delta: its delta.
            base: the fingerprint of the base's elements at the delta's positions.
            present: the fingerprint of the present ones.

        Raises:
            BaseMismatchError: the delta fits neither.
            DeltaError: it is a successor, and its strength is not 1.
        """
        wanted, result, words = delta.base_fingerprint, delta.result_fingerprint, self._words
        if wanted is None or (base == wanted and not self._stacked):
            return
        where = f"{self._label}: tensor {name!r}"
        if not self._stacked:
            check_fingerprint(where, base, wanted, result, words.remedies)
            return
        if base != wanted:
            self._misses_base = self._misses_base or name
        if present != wanted:
            self._misses_present = self._misses_present or name
        if self._misses_base is not None and self._misses_present is not None:
            if result in (base, present):
                raise BaseMismatchError(f"{where} already holds the result; {words.remedies.result}")
            raise BaseMismatchError(
                f"{self._label} was made for other weights: tensor {self._misses_base!r} is not the base's, and tensor"
                f" {self._misses_present!r} is not what {words.deltas} give; {words.restack}, or {words.remedies.other}"
            )
        if self._misses_base is not None and self._strength != 1:
            raise DeltaError(
                f"{where} was made for what {words.deltas} give, and so has strength 1 only; {words.strength}"
            )
