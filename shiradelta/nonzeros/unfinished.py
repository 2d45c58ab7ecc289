"""The state of an interrupted run; only the same run resumes from it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.nonzeros.saved_state import load_with_about, save_state
from shiradelta.util.files import os_errors

#: The least time between two saved states, in seconds.
SAVE_EVERY = 20


class UnfinishedRun:
    """A run's state on disk: tensors, and numbers that JSON can hold.

    Args:
        path: the file.
        identity: everything that the run's result depends on, in types that JSON can hold.
    """

    def __init__(self, path: Path, identity: object) -> None:
        self.path = path
        self._key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._saved = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to save the state again."""
        return time.monotonic() - self._saved > SAVE_EVERY

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Writes the state atomically, in a folder that is made if it is missing."""
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        save_state(self.path, tensors, {"run": self._key, "state": json.dumps(numbers)})
        self._saved = time.monotonic()

    def load(self, log: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of the state; None if there is none, or if it is another run's, which is logged.

        Raises:
            SourceError: the file is not the state of an unfinished run.
        """
        if not self.path.exists():
            return None
        tensors, about = load_with_about(self.path)
        try:
            key, numbers = about["run"], dict(json.loads(about["state"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise SourceError(f"{self.path}: is not the state of an unfinished run; move it away") from None
        if "base" in about:  # 0.1 kept it here
            numbers.setdefault("base", about["base"])
        if key != self._key:
            log(f"{self.path} belongs to a run with other settings or inputs; starting anew")
            return None
        return tensors, numbers

    def remove(self) -> None:
        """Deletes the state, if there is one."""
        self.path.unlink(missing_ok=True)
