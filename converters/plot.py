"""Plots a conversion: nonzeros and energy by layer, and the distance from the fine-tune while fitting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shiradelta.models.names import layer_of
from shiradelta.util.plots import new_figure, save, tick, title_and_legend
from shiradelta.util.text import count

from .report import ConversionReport, TensorReport

if TYPE_CHECKING:
    from shiradelta.fit.fitted import Fitted

_TICKS = 24


def draw(path: str | os.PathLike[str], report: ConversionReport) -> None:
    """Plots a conversion to a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TargetError: the file cannot be written.
    """
    fit = report.fit
    figure = new_figure(12 if fit else 8, 4.5)
    axes = figure.subplots(1, 2 if fit else 1, squeeze=False)[0]
    if fit is not None:
        _draw_steps(axes[0], fit)
    _draw_layers(axes[-1], report)
    save(figure, path)


def _draw_steps(axes: Any, fit: Fitted) -> None:
    """Plots the distance from the fine-tune against steps."""
    levels = (("base", fit.base, ":", "gray"), ("top-k", fit.topk, "--", "tab:orange"))
    old = () if fit.old_delta is None else (("old delta", fit.old_delta, "-.", "tab:red"),)
    for name, level, style, color in (*levels, *old, ("in the file", fit.fitted, "-", "tab:green")):
        axes.axhline(level, color=color, linestyle=style, label=f"{name}: {level:.3g}")
    if fit.history:
        axes.plot(*zip(*fit.history, strict=True), marker=".", color="tab:blue", label="while fitting")
        axes.locator_params(axis="x", integer=True)
    else:
        axes.set_xticks([])
    title = f"distance from the fine-tune, {count(fit.held_out, 'example')} held out"
    axes.set(xlabel="step" if fit.history else "closed form", ylabel=fit.measure, ylim=(0, None))
    title_and_legend(axes, title)


def _draw_layers(axes: Any, report: ConversionReport) -> None:
    """Plots each layer's share of nonzeros and energy; without a fit also how much of its energy each layer kept."""
    from matplotlib.ticker import PercentFormatter

    layers: dict[str, list[TensorReport]] = {}
    for tensor in report.tensors:
        if not tensor.operation.creates:
            layers.setdefault(layer_of(tensor.name), []).append(tensor)
    numbers = range(len(layers))
    nonzeros = [sum(t.nnz for t in tensors) for tensors in layers.values()]
    energy = [sum(t.energy for t in tensors) for tensors in layers.values()]
    axes.bar([n - 0.2 for n in numbers], _shares(nonzeros), 0.4, label="nonzeros, share of all")
    axes.bar([n + 0.2 for n in numbers], _shares(energy), 0.4, label="energy of the update, share of all")
    if report.fit is None:
        lost = [sum(t.lost for t in tensors) for tensors in layers.values()]
        kept = [1 - part / whole if whole else 1.0 for part, whole in zip(lost, energy, strict=True)]
        axes.plot(numbers, kept, color="tab:green", marker=".", label="energy kept, share of the layer's")
    every = -(-len(layers) // _TICKS)
    axes.set_xticks(numbers[::every], [tick(name) for name in list(layers)[::every]], rotation=90, fontsize=7)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(ylim=(0, None))
    title_and_legend(axes, f"{count(report.nnz, 'nonzero')} by layer")


def _shares(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts) or 1
    return [amount / total for amount in amounts]
