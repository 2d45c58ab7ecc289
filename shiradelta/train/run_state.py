"""The state of an interrupted training run: mask, values, Adam's moments, history."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.train.tuner import Tuner

_POSITIONS = ".positions"
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: (step, running mean of the training loss, held-out loss), by evaluation.
History = list[tuple[int, float, float]]


@dataclass(frozen=True)
class RunState:
    """The state of an interrupted run.

    Attributes:
        tensors: the tensors of `Tuner.state_dict`, and Adam's moments.
        step: optimizer steps done.
        base: digest of the base weights at the mask when the run started.
        history: the history up to this step.
    """

    tensors: Mapping[str, Tensor]
    step: int
    base: str
    history: History

    @property
    def mask(self) -> dict[str, Tensor]:
        """Positions by weight."""
        found = self.tensors.items()
        return {name.removesuffix(_POSITIONS): where for name, where in found if name.endswith(_POSITIONS)}

    def restore(self, tuner: Tuner, optimizer: torch.optim.Optimizer, model: Path, path: Path) -> None:
        """Restores tuner and optimizer.

        Args:
            tuner: with the mask of the state.
            optimizer: Adam or a variant.
            model: the model's folder, for the message.
            path: the state's file, for the message.

        Raises:
            SourceError: the weights of the model have changed since the run started.
        """
        if digest(tuner) != self.base:
            raise SourceError(
                f"{model}: its weights are not those that the interrupted run began with; revert it, or take away"
                f" {path} to start anew"
            )
        ends = tuple(f".{moment}" for moment in _MOMENTS)
        tuner.load_state_dict({name: tensor for name, tensor in self.tensors.items() if not name.endswith(ends)})
        for name, values in tuner.values.items():
            if f"{name}.{_MOMENTS[0]}" not in self.tensors:
                continue  # the loss does not depend on this weight
            optimizer.state[values] = {
                "step": torch.tensor(float(self.step)),
                **{moment: self.tensors[f"{name}.{moment}"].to(values.device) for moment in _MOMENTS},
            }


def save_run(
    unfinished: UnfinishedRun, tuner: Tuner, optimizer: torch.optim.Optimizer, step: int, history: History
) -> None:
    """Writes the state of a run."""
    tensors = tuner.state_dict()
    for name, values in tuner.values.items():
        for moment in _MOMENTS:
            if moment in optimizer.state[values]:
                tensors[f"{name}.{moment}"] = optimizer.state[values][moment].cpu()
    unfinished.save(tensors, {"step": step, "history": history, "base": digest(tuner)})


def load_run(unfinished: UnfinishedRun, log: Callable[[str], None]) -> RunState | None:
    """The saved state of this run; None if there is none.

    Raises:
        SourceError: the file is not a state.
    """
    state = unfinished.load(log)
    if state is None:
        return None
    tensors, found = state
    history = [(int(step), float(loss), float(held)) for step, loss, held in found["history"]]
    return RunState(tensors, int(found["step"]), found["base"], history)


def digest(tuner: Tuner) -> str:
    """Digest of the base weights at the mask."""
    found = hashlib.sha256()
    for _, base in sorted(tuner.base.items()):
        found.update(base.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
