"""The state of a fit while it trains; on disk, to resume an interrupted one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.nonzeros.unfinished import UnfinishedRun

_TENSORS = ("positions", "values", "mean", "square", "best_values")
_PLAIN = ("steps", "step", "counts", "mask", "failures", "waited", "history", "best", "refitted")


@dataclass
class FitState:
    """Everything that a resumed fit needs.

    Attributes:
        steps: optimizer steps of the whole run.
        step: optimizer steps done.
        counts: nonzeros by tensor.
        positions, values: the vectors of `Nonzeros`.
        mean, square: Adam's running means of the gradient and of its square.
        mask: the name of the mask that training started from; empty for that of the settings.
        failures: how often training gave NaN.
        waited: evaluations without a gain.
        history: (step, distance).
        best: least loss on the texts held out.
        best_values: the values with that loss.
        refitted: the distance that least squares left, where it was measured to choose a mask; 0 if not.
    """

    steps: int
    step: int
    counts: list[int]
    positions: Tensor
    values: Tensor
    mean: Tensor
    square: Tensor
    mask: str = ""
    failures: int = 0
    waited: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_values: Tensor | None = None
    refitted: float = 0.0

    def copy(self) -> FitState:
        """A copy whose tensors and lists nothing else writes to."""
        tensors = {name: tensor.clone() for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        return replace(self, counts=list(self.counts), history=list(self.history), **tensors)


def save_state(run: UnfinishedRun, state: FitState) -> None:
    """Writes a state to disk."""
    tensors = {name: tensor.cpu() for name in _TENSORS if (tensor := getattr(state, name)) is not None}
    run.save(tensors, {name: getattr(state, name) for name in _PLAIN})


def load_state(run: UnfinishedRun, log: Callable[[str], None]) -> FitState | None:
    """The state of this run, or None if there is none.

    Raises:
        SourceError: the file holds something else.
    """
    found = run.load(log)
    if found is None:
        return None
    tensors, plain = found
    try:
        fields: dict[str, Any] = {**plain, **tensors}
        fields["history"] = [(int(step), float(distance)) for step, distance in fields["history"]]
        return FitState(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(f"{run.path}: is not the state of a fit ({error}); move it away") from None
