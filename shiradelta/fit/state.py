"""An interrupted run on disk: a safetensors file, so that nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.files import replacing

from .train import State

_TENSORS = ("positions", "values", "mean", "square", "best_values")
_NUMBERS = ("steps", "step", "counts", "failures", "waited", "history", "best")


def save_state(path: Path, state: State, key: str) -> None:
    """Puts it in place atomically.  `key` tells the run: sources, texts and settings."""
    from safetensors.torch import save

    tensors = {name: getattr(state, name).cpu() for name in _TENSORS if getattr(state, name) is not None}
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    with replacing(path) as stream:
        stream.write(save(tensors, {"run": key, "state": json.dumps(numbers)}))


def load_state(path: Path, key: str) -> State | None:
    """The state of that very run, or None if there is none there.

    Raises:
        SourceError: something else is there.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        numbers = json.loads(metadata["state"])
        if metadata["run"] != key:
            return None
        numbers["history"] = [(int(step), float(distance)) for step, distance in numbers["history"]]
        return State(**numbers, **tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise SourceError(f"{path}: is no interrupted fit ({error}); move it away") from None
