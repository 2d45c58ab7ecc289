"""An interrupted fit on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.fit.training import State
from shiradelta.nonzeros import saved_state

_TENSORS = ("positions", "values", "mean", "square", "best_values")
_NUMBERS = ("steps", "step", "counts", "failures", "waited", "history", "best")


def save_state(path: Path, state: State, key: str) -> None:
    """Puts it in place atomically.  `key` tells the run: sources, texts and settings."""
    tensors = {name: getattr(state, name).cpu() for name in _TENSORS if getattr(state, name) is not None}
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    saved_state.save_state(path, tensors, {"run": key, "state": json.dumps(numbers)})


def load_state(path: Path, key: str) -> State | None:
    """The state of that very run, or None if there is none there.

    Raises:
        SourceError: something else is there.
    """
    if not path.exists():
        return None
    tensors, about = saved_state.load_with_about(path)
    if about.get("run") not in (None, key):
        return None
    try:
        fields: dict[str, Any] = {**json.loads(about["state"]), **tensors}
        fields["history"] = [(int(step), float(distance)) for step, distance in fields["history"]]
        return State(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(f"{path}: is no interrupted fit ({error}); move it away") from None
