"""Draws pictures with matplotlib, and checks before long work that one can be drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiradelta.errors import printable
from shiradelta.util.files import check_target, replacing
from shiradelta.util.optional import importing, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG = b"\x89PNG\r\n\x1a\n"
_PURPOSE = "a picture"


def check_plot(path: str | os.PathLike[str]) -> None:
    """Checks that a PNG can be drawn at `path`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TargetError: the folder does not exist, or a file at `path` is not a PNG.
    """
    require("matplotlib", _PURPOSE)
    check_target(Path(path), _PNG, "a PNG")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with a size in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with importing(_PURPOSE):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a PNG.

    Raises:
        TargetError: the file cannot be written.
    """
    with replacing(Path(path)) as stream:
        figure.savefig(stream, format="png", dpi=120)


def title_and_legend(axes: Any, title: str, columns: int = 2) -> None:
    """Puts a title and, below it, the legend above the axes, where neither hides what is drawn."""
    drawn = axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, fontsize=8, frameon=False)
    rows = -(-len(drawn.get_texts()) // columns)
    axes.set_title(title, pad=10 + 13 * rows)


def tick(name: str) -> str:
    """Formats a name as an axis label: shortens it to its end, and escapes what matplotlib takes for formulas."""
    short = printable(name) if len(name) <= 24 else "..." + printable(name[-21:])
    return short.replace("$", r"\$")
