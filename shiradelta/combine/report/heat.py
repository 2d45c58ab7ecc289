"""The heat map, layers by pairs, as a PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from shiradelta.combine.interference import Interference, Meeting
from shiradelta.util.optional import importing
from shiradelta.util.plots import new_figure, save, tick

#: With more pairs than this, panels are stacked instead of side by side.
_BESIDE = 6


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
    panels: tuple[tuple[str, str, Normalize, Callable[[Meeting], float]], ...] = (
        # On a square-root scale, so that a share of 1 % is visible.
        ("shared, of the smaller, %", "Oranges", PowerNorm(0.5, 0, 100), lambda m: 100 * m.shared / max(min(m.nnz), 1)),
        ("opposite signs, of these, %", "RdBu_r", Normalize(0, 100), lambda m: _or_nan(m.opposed_share, 100)),
        ("cosine", "RdBu_r", Normalize(-1, 1), lambda m: _or_nan(m.cosine)),
    )
    beside = len(panels) if len(by_pair) <= _BESIDE else 1
    below = len(panels) // beside
    width = 3 + beside * max(1.6, 0.5 * len(by_pair))
    height = 1.2 + 0.06 * max(map(len, pairs)) + 0.22 * len(layers) * below
    figure = new_figure(width, height)
    grid = figure.subplots(below, beside, sharex=True, sharey=True)
    for axes, (title, colours, norm, figure_of) in zip(grid, panels, strict=True):
        values = np.array([[figure_of(m.get(layer, Meeting((0, 0)))) for m in by_pair] for layer in layers])
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="none")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(by_pair)), pairs, rotation=60, ha="right")
        axes.set_yticks(range(len(layers)), [tick(layer) for layer in layers])
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / len(layers) + 0.2)).ax.tick_params(labelsize=7)
    save(figure, path)


def _or_nan(value: float | None, scale: float = 1) -> float:
    return float("nan") if value is None else scale * value
