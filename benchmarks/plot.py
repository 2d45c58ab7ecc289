"""Draws what `benchmarks.switch` and `benchmarks.drift` have measured: `python -m benchmarks.plot`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.switch import RESULTS

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """A table."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _lines(
    axes: Any, rows: Rows, key: Callable[[dict[str, str]], str], x: str, y: Callable[[dict[str, str]], float]
) -> None:
    for what in dict.fromkeys(key(row) for row in rows):
        points = [(float(row[x]), y(row)) for row in rows if key(row) == what]
        axes.plot(*zip(*points, strict=True), marker="o", label=what)
    axes.legend(frameon=False)


def draw_switch(rows: Rows, target: Path) -> None:
    """Everything at 1 %, and lines of what HotSwap costs as things grow."""
    figure, ((dots, density), (size, adapters)) = plt.subplots(2, 2, figsize=(12, 8))
    compared = [row for row in rows if row["experiment"] == "compare"][::-1]
    ours = ["tab:blue" if row["what"].startswith("HotSwap") else "tab:gray" for row in compared]
    milliseconds = [1000 * float(row["seconds"]) for row in compared]
    # Points and not bars, whose lengths would say nothing on a logarithmic axis.
    dots.scatter(milliseconds, [row["what"] for row in compared], color=ours)
    for place, value in enumerate(milliseconds):
        dots.annotate(
            f"{value:,.3g}" if value < 999.5 else f"{value:,.0f}", (value, place), (6, -3.5), textcoords="offset points"
        )
    dots.set(xscale="log", xlabel="ms", title=f"layers: {compared[0]['layers']}; 1 %, int8")
    dots.set_xlim(min(milliseconds) / 1.5, max(milliseconds) * 2)
    dots.grid(axis="y", color="whitesmoke")
    dots.set_axisbelow(True)
    dots.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    dots.xaxis.set_major_formatter("{x:g}")
    dots.xaxis.set_minor_formatter("")
    for axes, experiment, x in (
        (density, "density", "share of weights that change, %"),
        (size, "size", "layers"),
        (adapters, "adapters", "adapters active together, 1 % each"),
    ):
        chosen = [row for row in rows if row["experiment"] == experiment]
        copies = [row for row in chosen if row["what"].startswith("copy")]
        lines = [row for row in chosen if row not in copies and not row["what"].endswith("time")]
        if len({row["x"] for row in lines}) < 2:
            axes.set_axis_off()
            continue
        _lines(axes, lines, lambda row: row["what"], "x", lambda row: 1000 * float(row["seconds"]))
        for row in copies:
            axes.axhline(1000 * float(row["seconds"]), color="tab:gray", linestyle="--")
            axes.annotate(
                "copy of the weights",
                (0.02, 1000 * float(row["seconds"])),
                xycoords=("axes fraction", "data"),
                xytext=(0, -12),
                textcoords="offset points",
            )
        axes.set(xlabel=x, ylabel="ms", ylim=(0, None))
    figure.suptitle(f"Llama-2-7B shapes, bf16, random weights; {rows[0]['machine']}\n{rows[0]['versions']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def draw_drift(rows: Rows, target: Path) -> None:
    """Weights that differ, over cycles."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    # A panel for each dtype: the curves of one method hide each other in a common one.
    figure, panels = plt.subplots(1, len(dtypes), figsize=(4.2 * len(dtypes), 4), sharey=True, squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        _lines(
            axes,
            chosen,
            lambda row: row["what"],
            "cycles",
            lambda row: 100 * int(row["differ"]) / int(row["weights"]),
        )
        axes.set(xscale="log", xlabel="adapters put in and taken out again", title=dtype)
        axes.xaxis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("weights that differ from the base, %")
    figure.suptitle(rows[0]["versions"], fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    """Draws every table that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    folder = parser.parse_args().folder
    for path in sorted(folder.glob("switch-*.csv")):
        draw_switch(read(path), path.with_suffix(".png"))
    if (folder / "drift.csv").exists():
        draw_drift(read(folder / "drift.csv"), folder / "drift.png")


if __name__ == "__main__":
    main()
