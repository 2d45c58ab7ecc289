"""The heat map, layers by pairs, as a PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shiradelta.combine.interference import Interference, Meeting
from shiradelta.util.optional import importing
from shiradelta.util.plots import new_figure, save, tick

#: With more pairs than this, panels are stacked instead of side by side.
_BESIDE = 6
#: With more cells than this, figures are left out: they would take longer than the rest of the report.
_MOST_CELLS = 1000


def draw(path: Path, found: Interference) -> None:
    """Writes three panels: shared weights, opposite signs among them, cosine.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TargetError: the file cannot be written.
    """
    with importing("a heat map"):
        from matplotlib.colors import Normalize, PowerNorm
    by_pair = [found.layers(pair) for pair in found.pairs]
    layers = list(dict.fromkeys(layer for meetings in by_pair for layer in meetings))
    pairs = [" + ".join(tick(found.labels[i]) for i in pair) for pair in found.pairs]
    panels: tuple[tuple[str, str, Normalize, Callable[[Meeting], float], str], ...] = (
        # On a square-root scale, so that a share of 1 % is visible.
        ("shared, of the smaller, %", "Oranges", PowerNorm(0.5, 0, 100), _shared_percent, ".2g"),
        ("opposite signs, of these, %", "RdBu_r", Normalize(0, 100), lambda m: _or_nan(m.opposed_share, 100), ".0f"),
        ("cosine", "RdBu_r", Normalize(-1, 1), lambda m: _or_nan(m.cosine), "z.2f"),
    )
    beside = len(panels) if len(by_pair) <= _BESIDE else 1
    below = len(panels) // beside
    width = 3 + beside * max(1.6, 0.55 * len(by_pair))
    height = 1.2 + 0.075 * max(map(len, pairs)) + 0.22 * len(layers) * below
    figure = new_figure(width, height)
    grid = figure.subplots(below, beside, sharex=True, sharey=True)
    for axes, (title, colours, norm, figure_of, form) in zip(grid, panels, strict=True):
        values = np.array([[figure_of(m.get(layer, Meeting((0, 0)))) for m in by_pair] for layer in layers])
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="none")
        _write_figures(axes, image, values, form)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(by_pair)), pairs, rotation=60, ha="right")
        axes.set_yticks(range(len(layers)), [tick(layer) for layer in layers])
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / len(layers) + 0.2)).ax.tick_params(labelsize=7)
    save(figure, path)


def _shared_percent(meeting: Meeting) -> float:
    return 100 * meeting.shared / max(min(meeting.nnz), 1)


def _write_figures(axes: Any, image: Any, values: npt.NDArray[np.float64], form: str) -> None:
    """Writes each cell's figure into it, in white where it is dark; nothing where it is unknown."""
    if values.size > _MOST_CELLS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            shown = "100" if form == ".2g" and value >= 99.5 else format(value, form)
            axes.text(column, row, shown, ha="center", va="center", fontsize=6, color=ink)


def _or_nan(value: float | None, scale: float = 1) -> float:
    return float("nan") if value is None else scale * value
