"""The rows of the comparison as a table and as a picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shiradelta.util.text import table

FIELDS = (
    "task", "source", "seed", "method", "sparsity", "bytes", "measure", "base", "tuned", "score", "kept",
    "second_measure", "second_kept", "distance", "seconds",
)  # fmt: skip
Rows = Iterable[Mapping[str, Any]]


def grouped(rows: Rows) -> dict[tuple[str, str, float, str], list[Mapping[str, Any]]]:
    """Rows that differ in the seed alone."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"], row["source"], float(row["sparsity"]), row["method"]].append(row)
    return dict(sorted(groups.items(), key=lambda group: group[0][:3]))


def summarise(rows: Rows) -> str:
    """Means over seeds, and their spread."""
    lines = [["task", "fine-tune", "weights", "file", "bytes", "score", "tuned", "gain kept", "spread", "second", "n"]]
    for (task, source, sparsity, method), found in grouped(rows).items():
        kept = [float(row["kept"]) for row in found]
        score, tuned, second = (
            statistics.fmean(float(row[key]) for row in found) for key in ("score", "tuned", "second_kept")
        )
        lines.append(
            [
                task,
                source,
                f"{sparsity:.1%}",
                method,
                f"{int(found[0]['bytes']):,}",
                f"{score:.3f}",
                f"{tuned:.3f}",
                f"{statistics.fmean(kept):.1%}",
                f"{statistics.stdev(kept):.1%}" if len(kept) > 1 else "-",
                f"{second:.1%}",
                str(len(kept)),
            ]
        )
    return table(lines)


#: Method -> what the legend calls it, where the name says too little.
_LABELS = {
    "fitted": "fitted",
    "top-k": "top-k, not fitted",
    "refit": "closed-form refit",
    "itself": "the LoRA, in half precision",
    "SVD": "low rank (SVD)",
    "trained, snip": "trained sparse (snip)",
}


def draw(rows: Rows, path: Path) -> None:
    """The share of the gain kept against the size of the file, one panel a fine-tune, two beside one another."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    groups = grouped(rows)
    panels = list(dict.fromkeys(key[:2] for key in groups))
    methods = list(dict.fromkeys(key[3] for key in groups))
    rows_of_panels = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3.4 * rows_of_panels + 0.5), layout="constrained")
    grid = figure.subplots(rows_of_panels, 2, sharey=True, squeeze=False)
    drawn = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        for number, method in enumerate(methods):
            points = [
                (int(found[0]["bytes"]) / 1000, [float(row["kept"]) for row in found])
                for key, found in groups.items()
                if key[:2] == panel and key[3] == method
            ]
            if points:
                means = [statistics.fmean(kept) for _, kept in points]
                spread = [
                    [mean - min(kept) for mean, (_, kept) in zip(means, points, strict=True)],
                    [max(kept) - mean for mean, (_, kept) in zip(means, points, strict=True)],
                ]
                style = {"marker": "o", "capsize": 3, "color": f"C{number}"}
                drawn[_LABELS.get(method, method)] = axes.errorbar([size for size, _ in points], means, spread, **style)
        axes.axhline(1, color="gray", linestyle=":")
        axes.set(title=", ".join(panel), xlabel="file, KB", xscale="log", ylim=(-0.1, 1.1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel("share of the gain kept; bars: lowest and highest seed", fontsize="medium")
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
