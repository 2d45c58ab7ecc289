"""The behaviour that a fit reproduces: a model's outputs on examples, and the distance between two models' outputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import DISTANCE
from shiradelta.fit.losses import ExampleLoss

#: Weight of the output in the loss at first; all terms share the rest, which guides the early layers.
LAST = 0.5
#: The compared results of a forward pass: matrices with one row per token or per text; the last is the output.
Outputs = list[Tensor]


class Behaviour(ABC):
    """Outputs of a model on examples, and their difference.

    Attributes:
        lengths: tokens of each example; examples of similar length share a batch.
        text_share: share of the target that comes from the examples themselves.
    """

    lengths: list[int]
    text_share = 0.0

    def __init__(self) -> None:
        self._scales: list[float] = []

    @property
    @abstractmethod
    def measure(self) -> str:
        """The unit of `distance`, in words; known after the first call of `outputs`."""

    @abstractmethod
    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        """A model's outputs on some examples, each on the device that made it."""

    @abstractmethod
    def differences(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> list[Tensor]:
        """One scalar per term of the loss, each zero for equal outputs on these examples."""

    def calibrate(self, batches: Iterable[tuple[Sequence[int], Outputs, Outputs]]) -> None:
        """Scales each term of the loss so that the base's is 1.

        Args:
            batches: (examples, the base's outputs, the teacher's).

        Raises:
            SourceError: the fine-tune gives no finite outputs, or behaves like its base.
        """
        found = [_together(self.differences(*batch)) for batch in batches]
        self._scales = torch.stack(found).mean(0).tolist()
        check_scales(self._scales)

    def target(self, teacher: Outputs, indices: Sequence[int]) -> Outputs:
        """The outputs that a student is trained to match; may change the teacher's outputs in place."""
        return teacher

    def weight(self, settled: float) -> float:
        """Weight of the output in the loss, by the progress to the final mask, 0 to 1."""
        return LAST

    def loss(self, indices: Sequence[int], student: Outputs, target: Outputs, last: float = LAST) -> Tensor:
        """The share of the base's difference that is left, averaged over the terms; the output weighs `last`."""
        if last == 1 and self._scales[-1] > 0:
            return self.differences(indices, student[-1:], target[-1:])[0] / self._scales[-1]
        terms = zip(self.differences(indices, student, target), self._scales, strict=True)
        left = _together([term / scale for term, scale in terms if scale > 0])
        return last * left[-1] + (1 - last) * left.mean()

    def token_weights(self, indices: Sequence[int], rows: int) -> Tensor | None:
        """How much each row that a layer gets of a batch counts in its statistics, padding and all [rows].

        Args:
            indices: the examples of the batch.
            rows: rows that the layer gets.

        Returns:
            The weights; None if all rows count alike, as where a layer gets some of the tokens only.
        """
        return None

    @abstractmethod
    def distance(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """How far a student is from its teacher on these examples, in the unit of `measure`."""

    def compare(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> dict[str, float]:
        """Measures of one batch by name: `distance` under the key `DISTANCE`, then further ones."""
        return {DISTANCE: self.distance(indices, student, teacher)}

    @property
    def example_loss(self) -> ExampleLoss | None:
        """The loss of held-out examples, known after the first call of `outputs`; None if there is no such loss."""
        return None

    def evidence(self, indices: Sequence[int], outputs: Outputs) -> Tensor:
        """What `example_loss` has to know of each example [n, k], on the CPU."""
        raise NotImplementedError

    def rows(self, indices: Sequence[int]) -> list[tuple[Tensor, int]] | None:
        """For each output: (the indices of its rows among the rows of all examples, the number of those).

        None if that is unknown, so that outputs cannot be cached.
        """
        return None


def _together(terms: Sequence[Tensor]) -> Tensor:
    """Scalars from any devices in one tensor, on the last one's device, which has the output."""
    return torch.stack([term.to(terms[-1].device) for term in terms])


def check_scales(scales: Sequence[float]) -> None:
    """Raises SourceError if the base's differences from the fine-tune are not finite, or all zero."""
    if not all(map(math.isfinite, scales)):
        raise SourceError("the fine-tune gives NaN or infinity on these examples; check it, or fit in float32")
    if not any(scale > 0 for scale in scales):
        raise SourceError("the fine-tune behaves like its base on these examples; give examples of its own task")
