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
from shiradelta.train.tuner_state import POSITIONS

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BEST = "best"

#: (step, running mean of the training loss, held-out loss), by evaluation.
History = list[tuple[int, float, float]]


@dataclass(frozen=True)
class BestState:
    """The values with the least held-out loss so far, of those with the final mask.

    Attributes:
        loss: the held-out loss.
        values: name -> parameter, as `Tuner.trained`, on the CPU.
    """

    loss: float
    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, tuner: Tuner, loss: float) -> BestState:
        """Copies the present values of a tuner."""
        return cls(loss, {name: values.detach().cpu().clone() for name, values in tuner.trained.items()})

    def restore(self, tuner: Tuner) -> None:
        """Gives a tuner the values."""
        with torch.no_grad():
            for name, values in tuner.trained.items():
                values.copy_(self.values[name])
        tuner.write()


@dataclass(frozen=True)
class RunState:
    """The state of an interrupted run.

    Attributes:
        tensors: the tensors of `Tuner.state_dict`, and Adam's moments.
        step: optimizer steps done.
        base: digest of the base weights at the mask when the run started.
        history: the history up to this step.
        best_loss: the least held-out loss of the final mask; None before there is one.
        relative_lr: the learning rate; None before it is found, and in a state of 0.1, where the settings have it.
    """

    tensors: Mapping[str, Tensor]
    step: int
    base: str
    history: History
    best_loss: float | None = None
    relative_lr: float | None = None

    @property
    def mask(self) -> dict[str, Tensor]:
        """Positions by weight."""
        found = self.tensors.items()
        return {name.removesuffix(POSITIONS): where for name, where in found if name.endswith(POSITIONS)}

    @property
    def of_tuner(self) -> dict[str, Tensor]:
        """The tensors of `Tuner.state_dict` alone."""
        ends = tuple(f".{part}" for part in (*_MOMENTS, _BEST))
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith(ends)}

    @property
    def best(self) -> BestState | None:
        """The best state so far."""
        ending = f".{_BEST}"
        found = self.tensors.items()
        values = {name.removesuffix(ending): one for name, one in found if name.endswith(ending)}
        return None if self.best_loss is None else BestState(self.best_loss, values)

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
        tuner.load_state_dict(self.of_tuner)
        for name, values in tuner.trained.items():
            if f"{name}.{_MOMENTS[0]}" not in self.tensors:
                continue  # the loss does not depend on this weight
            optimizer.state[values] = {
                "step": torch.tensor(float(self.step)),
                **{moment: self.tensors[f"{name}.{moment}"].to(values.device) for moment in _MOMENTS},
            }


def save_run(
    unfinished: UnfinishedRun,
    tuner: Tuner,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    history: History,
    best: BestState | None,
    relative_lr: float | None,
) -> None:
    """Writes the state of a run; before its first step there need be no optimizer and no learning rate."""
    tensors = tuner.state_dict()
    for name, values in tuner.trained.items():
        moments = {} if optimizer is None else optimizer.state[values]
        tensors |= {f"{name}.{moment}": moments[moment].cpu() for moment in _MOMENTS if moment in moments}
    if best is not None:
        tensors |= {f"{name}.{_BEST}": values for name, values in best.values.items()}
    about = {
        "step": step,
        "history": history,
        "base": digest(tuner),
        "best_loss": best and best.loss,
        "relative_lr": relative_lr,
    }
    unfinished.save(tensors, about)


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
    best_loss = found.get("best_loss")  # 0.1 kept no best state
    rate = found.get("relative_lr")
    return RunState(tensors, int(found["step"]), found["base"], history, best_loss, rate)


def digest(tuner: Tuner) -> str:
    """Digest of the base weights at the mask."""
    found = hashlib.sha256()
    for _, base in sorted(tuner.base.items()):
        found.update(base.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
