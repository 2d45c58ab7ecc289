"""The built-in masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from shiradelta.format.arithmetic import Positions
from shiradelta.format.draw import Draw
from shiradelta.format.registry import MAX_CELLS
from shiradelta.select.shares import count_for
from shiradelta.train.mask_registry import Chosen, MaskInput, Ticket, mask, seed_of
from shiradelta.util.arrays import distinct

if TYPE_CHECKING:
    from torch import Tensor

    from shiradelta.train.choose import Choice


@mask("snip", "weight x gradient", needs_gradients=True)
def snip(given: MaskInput) -> Tensor:
    """Scores: |weight x gradient|, summed over the calibration batches."""
    assert given.gradients is not None
    return wm(given).mul_(given.gradients)


@mask("grad", "gradient", needs_gradients=True)
def grad(given: MaskInput) -> Tensor:
    """Scores: |gradient|, summed over the calibration batches."""
    assert given.gradients is not None
    return given.gradients


@mask("wm", "weight magnitude")
def wm(given: MaskInput) -> Tensor:
    """Scores: |weight|."""
    return given.weight.reshape(-1).float().abs()


def random_scores(given: MaskInput) -> Tensor:
    """Uniformly random scores, drawn on the CPU so that they are the same for every device."""
    import torch

    generator = torch.Generator().manual_seed(given.number)
    return torch.rand(given.weight.numel(), generator=generator).to(given.weight.device)


@mask(
    "rand",
    "at random",
    gives="positions",
    can_be_larger=True,
    whole_model=True,  # the share is that of each weight, too
    pattern_scores=random_scores,
)
def rand(given: MaskInput) -> Chosen:
    """Positions: one in each of as many cells of equal size, so that a file can name their seed instead."""
    numel = given.weight.numel()
    avoided = 0 if given.avoid is None else given.avoid.size / max(numel, 1)
    if not all(view.is_whole for view in given.views) or not given.views:
        return Chosen(draw_of(numel, given.share, given.seed, avoided).positions(numel))
    draws, found = {}, []
    for view in given.views:
        seed = given.seed if len(given.views) == 1 else f"{given.seed} {view.name}"
        draws[view.name] = drawn = draw_of(view.weight.numel, given.share, seed, avoided)
        found.append(view.to_weight(drawn.positions(view.weight.numel))[1])
    return Chosen(distinct(np.concatenate(found)), draws)


@mask("struct", "whole rows and the diagonal", gives="positions")
def struct(given: MaskInput) -> Positions:
    """Positions: evenly spaced rows and the diagonal."""
    if given.avoid is None:
        return rows_and_diagonal(given.shape, given.count)
    # One of the shifts of the rows overlaps the other mask least.
    shifts = range(min(given.shape[0] if given.shape else 1, 64))
    apart = (
        np.setdiff1d(rows_and_diagonal(given.shape, given.count, shift), given.avoid, assume_unique=True)
        for shift in shifts
    )
    return max(apart, key=len)


#: Pulls RIGSA's changes to the base, relative to the learning rate.
DECAY = 0.1


@mask("rigsa", "by training and pruning a random change", gives="tickets", needs_gradients=True, weight_decay=DECAY)
def rigsa(choice: Choice) -> dict[str, Ticket]:
    """Tickets: what is left of a random change of all elements, trained and pruned for the batches several times."""
    from shiradelta.train.rigsa import search  # takes torch

    return search(choice, DECAY)


def rows_and_diagonal(shape: tuple[int, ...], count: int, start: int = 0) -> Positions:
    """Positions of evenly spaced rows and of the diagonal, which keeps the rank high.

    Args:
        shape: a matrix; each of stacked matrices (experts) is chosen from by itself, and other tensors are [first, all
            others].
        count: approximate number of elements; the diagonal is always included.
        start: the first row, for a mask that overlaps another one less.
    """
    if len(shape) == 3:
        each = rows_and_diagonal(shape[1:], max(1, count // shape[0]), start)
        steps = np.arange(shape[0], dtype=np.int64) * (shape[1] * shape[2])
        return (steps[:, None] + each).reshape(-1)
    if len(shape) < 2:
        return np.linspace(0, math.prod(shape), max(count, 1), endpoint=False, dtype=np.int64)
    rows, columns = shape[0], math.prod(shape[1:])
    diagonal = np.arange(min(rows, columns), dtype=np.int64) * (columns + 1)
    lines = min(rows, max(0, round((count - diagonal.size) / max(columns, 1))))
    chosen = (start + np.arange(lines, dtype=np.int64) * rows // max(lines, 1)) % rows
    elements = (chosen[:, None] * columns + np.arange(columns)).reshape(-1)
    return distinct(np.concatenate([elements, diagonal]))


def draw_of(numel: int, share: float, seed: str, avoided: float = 0) -> Draw:
    """The draw that leaves a share of a tensor's elements, one in each cell.

    Args:
        numel: elements of the tensor.
        share: the share.
        seed: any text; the same text gives the same positions on every machine.
        avoided: the share of the elements that is taken out of the positions afterwards.
    """
    cells = round(count_for(share, numel) / (1 - avoided)) if avoided < 1 else numel
    return Draw(seed_of(seed), min(cells, numel, MAX_CELLS))
