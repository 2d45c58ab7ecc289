"""Plots the losses of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shiradelta.util.plots import new_figure, save


def draw_losses(path: Path, history: Sequence[tuple[int, float, float]]) -> None:
    """Writes the losses as a PNG.

    Args:
        path: the file.
        history: (step, running mean of the training loss, held-out loss).

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TargetError: the file cannot be written.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    steps, means, held_out = zip(*history, strict=True)
    axes.plot(steps, means, marker=".", label="training, running mean")
    axes.plot(steps, held_out, marker=".", label="held out")
    axes.axhline(held_out[0], color="gray", linestyle=":", label=f"base {held_out[0]:.3g}")
    axes.set(xlabel="step", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    save(figure, path)
