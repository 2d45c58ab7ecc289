"""The state of an interrupted training of a family, in a folder: a file a member, and one of the features."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shiradelta.errors import TargetError
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.util.files import os_errors

_SUFFIX = ".train"
_FEATURES = "features"
_SCALES = "scales."


class UnfinishedFamily:
    """Keeps what is done, so that the same call goes on where it was.

    A member that is finished is kept as the state after its last step.

    Args:
        folder: where; made with the first state that is kept.
        identity: everything that the base delta depends on, in types that JSON can hold.
        log: called with lines for the user.

    Raises:
        TargetError: the folder cannot be made, or holds other files.
    """

    def __init__(self, folder: Path, identity: object, log: Callable[[str], None]) -> None:
        self.folder, self.log, self._identity = folder, log, identity
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)  # now, as an error that comes after hours of work is late
            found = list(folder.iterdir())
            if not found:
                folder.rmdir()  # a process that is killed early leaves nothing
        others = sorted(path.name for path in found if path.suffix != _SUFFIX and path.name[0] != ".")
        if others:
            raise TargetError(f"{folder}: holds {others[0]}, so it is no state of a family; give another folder")

    def run(self, name: str, *inputs: object) -> UnfinishedRun:
        """The state of a member's training, which depends on the inputs, too."""
        return UnfinishedRun(self.folder / f"{name}{_SUFFIX}", [self._identity, name, *inputs])

    def features(self, dims: int) -> tuple[dict[str, Array], Float32] | None:
        """(scales, features) of the examples, if they are there."""
        state = self.run(_FEATURES, dims).load(self.log)
        if state is None:
            return None
        tensors, _ = state
        scales = {n.removeprefix(_SCALES): one.numpy() for n, one in tensors.items() if n.startswith(_SCALES)}
        return scales, tensors[_FEATURES].numpy()

    def keep_features(self, dims: int, scales: dict[str, Array], features: Float32) -> None:
        """Writes what `features` reads."""
        tensors = {_SCALES + name: torch.from_numpy(one) for name, one in scales.items()}
        self.run(_FEATURES, dims).save(tensors | {_FEATURES: torch.from_numpy(features)}, {})

    def remove(self) -> None:
        """Deletes the state, when the family is written."""
        for path in self.folder.glob(f"*{_SUFFIX}"):
            path.unlink()
        with os_errors(self.folder):
            if self.folder.exists() and not os.listdir(self.folder):
                self.folder.rmdir()


def digest_of(examples: Sequence[Any]) -> str:
    """What tells lists of examples apart: a digest of their JSON, or their number where they have none."""
    try:
        return hashlib.sha256(json.dumps(list(examples)).encode()).hexdigest()
    except (TypeError, ValueError):
        return str(len(examples))
