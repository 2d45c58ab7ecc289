"""Masks: which share of a weight is trained (Bhardwaj et al., arXiv:2406.13175, section 3.1).

`struct` and `rand` give positions; `wm`, `grad` and `snip` give scores, of which `top` or `n_of_m` takes the largest.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from torch import Tensor

from shiradelta.format.arithmetic import Positions

#: Name -> whether it needs gradients.
MASKS = {"struct": False, "rand": False, "wm": False, "grad": True, "snip": True}


def struct(shape: tuple[int, ...], count: int, start: int = 0) -> Positions:
    """Every f-th row and the diagonal, about `count` elements; the diagonal keeps the rank high.

    Args:
        shape: a matrix's; of stacked matrices (experts) each gets its own, other tensors are [first, all others].
        count: how many elements to come near to; there is at least the diagonal.
        start: the first row, for a mask apart from another's.
    """
    if len(shape) == 3:
        each = struct(shape[1:], max(1, count // shape[0]), start)
        steps = np.arange(shape[0], dtype=np.int64) * (shape[1] * shape[2])
        return (steps[:, None] + each).reshape(-1)
    if len(shape) < 2:
        return np.linspace(0, math.prod(shape), max(count, 1), endpoint=False, dtype=np.int64)
    rows, columns = shape[0], math.prod(shape[1:])
    diagonal = np.arange(min(rows, columns), dtype=np.int64) * (columns + 1)
    lines = min(rows, max(0, round((count - diagonal.size) / max(columns, 1))))
    chosen = (start + np.arange(lines, dtype=np.int64) * rows // max(lines, 1)) % rows
    elements = (chosen[:, None] * columns + np.arange(columns)).reshape(-1)
    return np.unique(np.concatenate([elements, diagonal]))


def rand(numel: int, sparsity: float, seed: str, avoid: Positions | None = None) -> Positions:
    """Each element with probability `sparsity`, alone.

    Drawn as their number (binomial) and that many places, which is the same and does not take a number an element.

    Args:
        numel: elements of the tensor.
        sparsity: the probability.
        seed: anything; the same gives the same mask on every machine.
        avoid: positions that are not to be drawn, increasing.
    """
    generator = np.random.Generator(np.random.Philox(seed_of(seed)))
    taken = np.zeros(0, np.int64) if avoid is None else avoid
    count = min(int(generator.binomial(numel, sparsity)), numel - taken.size)
    if count > (numel - taken.size) // 2:
        free = np.ones(numel, bool)
        free[taken] = False
        return np.sort(generator.choice(np.flatnonzero(free), count, replace=False))
    found = np.zeros(0, np.int64)
    while found.size < count:
        drawn = np.union1d(found, generator.integers(0, numel, count - found.size))
        found = np.setdiff1d(drawn, taken, assume_unique=True) if taken.size else drawn
    return found


def seed_of(text: str) -> int:
    """A number of 63 bits that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def wm(weight: Tensor) -> Tensor:
    """Scores: the magnitude of the weight.  Flat, float32."""
    return weight.reshape(-1).float().abs()


def grad(weight: Tensor, gradients: Tensor) -> Tensor:
    """Scores: the gradient's magnitude, summed over the calibration batches.  Flat, float32."""
    return gradients


def snip(weight: Tensor, gradients: Tensor) -> Tensor:
    """Scores: the magnitude of weight times gradient, summed over the calibration batches.  Flat, float32."""
    return wm(weight).mul_(gradients)


def can_be_larger(mask: object, pattern: tuple[int, int] | None) -> bool:
    """Whether a mask's name stands for one of any size: not one's own, nor one of a pattern."""
    return isinstance(mask, str) and mask != "struct" and pattern is None
