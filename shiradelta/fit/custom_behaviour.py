"""The behaviour of any module, by a forward function that the user gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import ArgumentError
from shiradelta.fit.behaviour import Behaviour, Outputs


class CustomBehaviour(Behaviour):
    """Outputs of the user's own `forward`.

    Args:
        examples: of any kind.
        forward: (model, examples) -> tensor or tensors.
        loss: (student's, teacher's) -> scalar; None takes mean squared errors.

    Raises:
        ArgumentError: `forward` or `loss` gives something else; raised where they are called.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        forward: Callable[[Any, Sequence[Any]], Any],
        loss: Callable[[Any, Any], Any] | None,
    ) -> None:
        super().__init__()
        self._examples, self._forward, self._loss = examples, forward, loss
        self.lengths = [0] * len(examples)

    @property
    def measure(self) -> str:
        return "relative error of the outputs" if self._loss is None else "the given loss"

    def outputs(self, model: nn.Module, indices: Sequence[int]) -> Outputs:
        found = self._forward(model, [self._examples[index] for index in indices])
        outputs = [found] if isinstance(found, Tensor) else list(found) if isinstance(found, Iterable) else []
        if not outputs or not all(isinstance(output, Tensor) for output in outputs):
            got = f"gave {type(found).__name__}"
            raise ArgumentError(f"{got}; let it return a tensor, or a list of them", argument="forward")
        return outputs

    def differences(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> list[Tensor]:
        if self._loss is not None:
            one = len(student) == 1
            found = self._loss(student[0] if one else student, teacher[0] if one else teacher)
            if not isinstance(found, Tensor) or found.numel() != 1:
                got = f"gave shape {list(found.shape)}" if isinstance(found, Tensor) else f"gave {type(found).__name__}"
                raise ArgumentError(f"{got}; let it return a tensor with one number", argument="loss")
            return [found.reshape(())]
        return [(s.float() - t.float()).square().mean() for s, t in zip(student, teacher, strict=True)]

    def distance(self, indices: Sequence[int], student: Outputs, teacher: Outputs) -> float:
        """The user's loss, or the relative error of all outputs together."""
        if self._loss is not None:
            return float(self.differences(indices, student, teacher)[0])
        error = sum(float((s.float() - t.float()).square().sum()) for s, t in zip(student, teacher, strict=True))
        size = sum(float(t.float().square().sum()) for t in teacher)
        return float((error / max(size, 1e-30)) ** 0.5)
