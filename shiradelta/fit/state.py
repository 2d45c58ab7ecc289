"""The state of a fit while it trains; on disk, to resume an interrupted one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.nonzeros.unfinished import UnfinishedRun

_VECTORS = ("positions", "values", "mean", "square", "best_values")
_PLAIN = ("steps", "step", "counts", "mask", "failures", "waited", "history", "best", "refitted")


@dataclass
class FitState:
    """Everything that a resumed fit needs.

    Attributes:
        steps: optimizer steps of the whole run.
        step: optimizer steps done.
        counts: nonzeros by tensor.
        positions, values: the vectors of `Nonzeros`; one of each as read from disk.
        mean, square: Adam's running means of the gradient and of its square, by vector.
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
    positions: list[Tensor]
    values: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]
    mask: str = ""
    failures: int = 0
    waited: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_values: list[Tensor] | None = None
    refitted: float = 0.0

    def copy(self) -> FitState:
        """A copy whose tensors and lists nothing else writes to."""
        copied = replace(self, counts=list(self.counts), history=list(self.history))
        for name, vectors in self.vectors().items():
            setattr(copied, name, [own.clone() for own in vectors])
        return copied

    def vectors(self) -> dict[str, list[Tensor]]:
        """The vectors by the name of their attribute, without those that there are not yet."""
        return {name: found for name in _VECTORS if (found := getattr(self, name)) is not None}


def save_state(run: UnfinishedRun, state: FitState) -> None:
    """Writes a state to disk."""
    tensors = {name: torch.cat([own.cpu() for own in found]) for name, found in state.vectors().items()}
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
        fields: dict[str, Any] = {**plain, **{name: [tensor] for name, tensor in tensors.items()}}
        fields["history"] = [(int(step), float(distance)) for step, distance in fields["history"]]
        return FitState(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(f"{run.path}: is not the state of a fit ({error}); move it away") from None
