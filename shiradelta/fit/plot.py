"""The fit as a picture: distance against steps, and where the nonzeros and the energy lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.files import os_errors
from shiradelta.nonzeros import Nonzeros


def draw(
    path: Path,
    names: Sequence[str],
    nonzeros: Nonzeros,
    deltas: Sequence[Tensor],
    history: Sequence[tuple[int, float]],
    levels: dict[str, float],
    measure: str,
) -> None:
    """Writes a PNG.  `levels` are distances to draw as lines, by name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SourceError("a plot needs matplotlib; install it, or leave the plot out") from None

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    steps, tensors = figure.subplots(1, 2)
    for (name, level), style in zip(levels.items(), (":", "--", "-."), strict=False):
        steps.axhline(level, color="gray", linestyle=style, label=f"{name} {level:.3g}")
    if history:
        steps.plot(*zip(*history, strict=True), marker=".", label="while fitting")
    steps.set(xlabel="step", ylabel=measure, title="distance from the fine-tune, texts held out", ylim=(0, None))
    steps.legend()

    numbers = range(len(names))
    energy = [float(delta.square().sum()) for delta in deltas]
    tensors.bar([n - 0.2 for n in numbers], _shares(nonzeros.counts), 0.4, label="nonzeros")
    tensors.bar([n + 0.2 for n in numbers], _shares(energy), 0.4, label="energy of the fine-tune")
    tensors.set(title="share of all, by tensor")
    every = max(1, len(names) // 24)
    tensors.set_xticks(numbers[::every], [_short(name) for name in names[::every]], rotation=90, fontsize=6)
    tensors.legend()
    with os_errors(path):
        figure.savefig(path, format="png", dpi=120)


def _shares(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts) or 1
    return [amount / total for amount in amounts]


def _short(name: str) -> str:
    return name if len(name) <= 32 else "..." + name[-29:]
