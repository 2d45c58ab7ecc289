"""Positions of the k largest numbers, in torch; `shiradelta.select.largest` has NumPy's and the rule for ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions, int64, increasing, of the k largest."""
    return _topk(scores, k).sort().values


def largest_of_all(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Positions, increasing, of the k largest of all tensors together, one tensor of positions each."""
    chosen = largest(_joined(scores), k)
    edges = torch.tensor([0, *(score.numel() for score in scores)], device=chosen.device).cumsum(0)
    cuts = torch.searchsorted(chosen, edges).tolist()
    return [(chosen[a:b] - edges[i]).to(scores[i].device) for i, (a, b) in enumerate(pairwise(cuts))]


def largest_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Bool, one tensor each: true at the k largest of all tensors together."""
    mask = largest_mask(_joined(scores), k)
    found = zip(torch.split(mask, [len(score) for score in scores]), scores, strict=True)
    return [own.to(score.device) for own, score in found]


def _joined(scores: Sequence[Tensor]) -> Tensor:
    """All scores in one tensor, on the CPU if they are on several devices, none of which has to have the room."""
    one = len({score.device for score in scores}) == 1
    return torch.cat([score if one else score.cpu() for score in scores])


def largest_mask(scores: Tensor, k: int) -> Tensor:
    """Bool, of the shape of the scores: true at the k largest."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[_topk(scores, k)] = True
    return mask


def largest_of_groups(scores: Tensor, row: int, n: int, m: int) -> Tensor:
    """Positions, increasing, of the n largest of every m consecutive numbers in a row (N:M sparsity).

    Args:
        scores: flat.
        row: numbers in a row.  The last group of a row may be shorter; it keeps n, too, if it has as many.
        n: how many to take from a group.
        m: numbers in a group.
    """
    groups = -(-row // m)
    padded = torch.nn.functional.pad(scores.view(-1, row), (0, groups * m - row), value=-math.inf).view(-1, m)
    best = padded.topk(n)
    lines = torch.arange(len(padded), device=scores.device)
    positions = (lines // groups * row + lines % groups * m)[:, None] + best.indices
    return positions[best.values > -math.inf].sort().values


def _topk(scores: Tensor, k: int) -> Tensor:
    return scores.topk(min(k, scores.numel()), sorted=False).indices
