"""Measures how far a model is from the fine-tune on held-out texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from shiradelta.fit.behaviour import Behaviour, Outputs
from shiradelta.fit.gain import BASE, TUNED, Evidence, Gain
from shiradelta.fit.teacher import Teacher
from shiradelta.text.batches import by_length, mean_over


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
            state: what the model is now, "base", "topk" or "fitted"; each once.
        """

        def compare(part: Sequence[int], student: Outputs, teacher: Outputs) -> Mapping[str, float]:
            self._evidence.add(state, part, student)
            if state == BASE:
                self._evidence.add(TUNED, part, teacher)
            return self._behaviour.compare(part, student, teacher)

        return self.mean(compare)

    def gain(self) -> Gain | None:
        """How much of the fine-tune's gain is kept, once all states are measured; None if that is unknown."""
        return self._evidence.gain()

    def mean(self, measure: Callable[[Sequence[int], Outputs, Outputs], Mapping[str, float]]) -> dict[str, float]:
        """Means over all texts of `measure`(texts of a batch, the model's outputs, the teacher's outputs)."""

        def of_batch(part: Sequence[int]) -> Mapping[str, float]:
            return measure(part, self._behaviour.outputs(self._model, part), self._teacher.outputs(part))

        return mean_over(self._parts, of_batch)
