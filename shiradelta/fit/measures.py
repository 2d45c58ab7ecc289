"""Measures how far a model is from the fine-tune on held-out texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from shiradelta.fit.behaviour import Behaviour, Outputs
from shiradelta.fit.gain import BASE, TUNED, Evidence, Gain
from shiradelta.fit.teacher import Teacher, exchanged
from shiradelta.text.batches import Key, by_length, mean_over


class HeldOut:
    """Compares a model with the fine-tune on held-out texts.

    Args:
        model: its weights may change between measurements.
        behaviour: the outputs to compare.
        teacher: the fine-tune.
        indices: the texts.
        batch: texts per forward pass.
    """

    def __init__(
        self, model: nn.Module, behaviour: Behaviour, teacher: Teacher, indices: Sequence[int], batch: int
    ) -> None:
        self._model, self._behaviour, self._teacher = model, behaviour, teacher
        self._parts = by_length(indices, behaviour.lengths, batch)
        self._evidence = Evidence(behaviour)

    def measures(self, state: str) -> dict[str, float]:
        """Every measure of `Behaviour.compare`, by name; and remembers the outputs of the model in this state.

        Args:
            state: what the model is now, "base", "topk", "old_delta" or "fitted"; each once.
        """

        def compare(part: Sequence[int], student: Outputs, teacher: Outputs) -> Mapping[str, float]:
            self._evidence.add(state, part, student)
            if state == BASE:
                self._evidence.add(TUNED, part, teacher)
            return self._behaviour.compare(part, student, teacher)

        return self.mean(compare)

    def apart(self, old: Mapping[Tensor, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """(how far the new base is from the old one, what the old delta adds to that), while the model is the new base.

        Args:
            old: weight -> the old base's.
        """

        def compare(part: Sequence[int], new: Outputs, tuned: Outputs) -> dict[tuple[int, str], float]:
            with exchanged(old):
                before = self._behaviour.outputs(self._model, part)
            pairs = self._behaviour.compare(part, new, before), self._behaviour.compare(part, before, tuned)
            return {(number, name): value for number, found in enumerate(pairs) for name, value in found.items()}

        found = self.mean(compare)
        both = ({name: value for (number, name), value in found.items() if number == one} for one in range(2))
        return next(both), next(both)

    def added(self, without: Callable[[], AbstractContextManager[None]]) -> dict[str, float]:
        """What the model's delta adds to it: how far the model without it is from the model as it is.

        Args:
            without: a context in which the model lacks the delta.
        """

        def compare(part: Sequence[int], student: Outputs, teacher: Outputs) -> Mapping[str, float]:
            with without():
                return self._behaviour.compare(part, self._behaviour.outputs(self._model, part), student)

        return self.mean(compare)

    def gain(self) -> Gain | None:
        """How much of the fine-tune's gain is kept, once all states are measured; None if that is unknown."""
        return self._evidence.gain()

    def mean(self, measure: Callable[[Sequence[int], Outputs, Outputs], Mapping[Key, float]]) -> dict[Key, float]:
        """Means over all texts of `measure`(texts of a batch, the model's outputs, the teacher's outputs)."""

        def of_batch(part: Sequence[int]) -> Mapping[Key, float]:
            return measure(part, self._behaviour.outputs(self._model, part), self._teacher.outputs(part))

        return mean_over(self._parts, of_batch)
