"""Small checkpoints for transformers' Trainer, and for trainers derived from it (TRL)."""

from __future__ import annotations

import re
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import TrainerCallback

from shiradelta.errors import DeltaError
from shiradelta.nonzeros.saved_state import load_state, save_state
from shiradelta.train.tuned import SUFFIX
from shiradelta.train.tuner import Tuner

STATE, ADAPTER = "nonzeros.safetensors", "adapter.shd"


class SparseCheckpoints(TrainerCallback):  # type: ignore[misc]
    """A Trainer callback that makes checkpoints small: they hold the nonzeros instead of the model.

    A checkpoint has `nonzeros.safetensors`, with mask and values to resume from, and `adapter.shd`, which can be
    applied as it is.  `trainer.save_model` still writes the whole patched model to other folders.

        trainer = Trainer(model, ..., callbacks=[SparseCheckpoints(tuner)])

    Args:
        tuner: the model's tuner.
        values: the value codec of `adapter.shd`.
    """

    def __init__(self, tuner: Tuner, values: str = "int4") -> None:
        self._tuner, self._values = tuner, values

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Restores the mask of the checkpoint to resume from; from now on checkpoints hold nonzeros only."""
        path = self._folder(args, state) / STATE
        if state.global_step and path.exists():
            self._tuner.load_state_dict(load_state(path))
        model: Any = self._tuner.model
        save = getattr(type(model), "save_pretrained", None)
        if save is None:
            return  # a plain module; the Trainer saves it whole

        def save_nonzeros(model: Any, folder: Any, state_dict: Any = None, **options: Any) -> None:
            if _is_checkpoint(args, folder):  # another folder is the user's own, for example after an interruption
                own = {name: p for name, p in model.named_parameters() if name.endswith(SUFFIX)}
                state_dict = own or state_dict
            save(model, folder, state_dict=state_dict, **options)

        model.__dict__["save_pretrained"] = MethodType(save_nonzeros, model)  # a copy of the model is bound to itself

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Adds mask, values and adapter to a checkpoint."""
        folder = self._folder(args, state)
        found = self._tuner.state_dict()
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_state(folder / STATE, found)
        if any(bool((values != 0).any()) for name, values in found.items() if name.endswith(".values")):
            self._tuner.save(folder / ADAPTER, self._values, {"step": str(state.global_step)})

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Writes the last values into the weights, or the best ones if the Trainer loads these."""
        self._tuner.model.__dict__.pop("save_pretrained", None)
        best = args.load_best_model_at_end and state.best_model_checkpoint
        if best and (path := Path(best) / STATE).exists():
            self._tuner.load_state_dict(load_state(path))  # the mask too; the Trainer does not know it
        else:
            self._tuner.write()

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        if args.output_dir is None:
            raise DeltaError("the Trainer has no output_dir to keep checkpoints in; set it in its arguments")
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_checkpoint(args: Any, folder: Any) -> bool:
    """Whether a folder is a checkpoint of the Trainer: checkpoint-STEP in its output folder."""
    path = Path(folder)
    return Path(args.output_dir) in path.parents and re.fullmatch(r"checkpoint-\d+", path.name) is not None
