"""Exports to a merged model: a copy of the base's folder with the delta in it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shiradelta.errors import DeltaError
from shiradelta.folder.apply import apply
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta
from shiradelta.util.progress import Progress

from .layouts import Written, export


@export(
    "merged",
    "A copy of the base's folder with the delta in its weights, as `apply --out` writes it.",
    options=("model", "strength", "progress"),
    needs_model=True,
)
def write(
    folder: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str],
    strength: float = 1.0,
    progress: Progress | None = None,
) -> Written:
    """Writes a merged model, which `revert` makes the base again.

    Args:
        folder: a new folder.
        deltas: an open `.shd` file.
        base: ignored.
        model: the base's folder.
        strength: alpha, the factor of the values.
        progress: called with (what, done, total).

    Raises:
        BaseMismatchError: the delta was made for another base.
        DeltaError: the delta is not that of a file, or cannot have this strength.
        TargetError: the folder cannot be written.
    """
    if not isinstance(deltas, Delta):
        raise DeltaError("only a delta in a file is merged; save it first")
    return Written(warnings=apply(model, deltas, folder, strength, progress=progress).warnings)
