"""Pictures: whether one can be drawn, asked before the long work."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.util.files import PNG, check_target


def check_plot(path: str | os.PathLike[str]) -> None:
    """Checks that a PNG can be drawn at `path`.

    Raises:
        SourceError: matplotlib is missing.
        TargetError: the folder does not exist, or something other than a PNG is there.
    """
    if find_spec("matplotlib") is None:
        raise SourceError("a plot needs matplotlib; install shiradelta[fit], or leave the plot out")
    check_target(Path(path), PNG, "a PNG")
