"""Splits examples into those to train on and those held out, and both into batches of similar length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out); at most a fifth of the examples is held out."""
    order = random.Random(seed).sample(range(count), count)
    cut = min(held_out, count // 5)
    return order[cut:], sorted(order[:cut])


def batches(indices: Sequence[int], lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Yields batches forever, each of examples of similar length, so that few tokens are padding.

    The order within an epoch depends only on `seed` and the epoch's number, so a resumed run sees the same batches.

    Args:
        indices: the examples to use.
        lengths: tokens of every example, by index.
        size: examples per batch.
        seed: the seed of the order.
    """
    size = min(size, len(indices))
    epoch = 0
    while True:
        rng = random.Random(f"{seed} {epoch}")
        # Examples that do not fill a batch are left out before sorting: afterwards they would always be the longest.
        taken = rng.sample(indices, len(indices) // size * size)
        parts = by_length(taken, lengths, size)
        rng.shuffle(parts)
        yield from parts
        epoch += 1


def by_length(indices: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Every example once, in batches of similar length; the last batch may be smaller."""
    ordered = sorted(indices, key=lambda index: lengths[index])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def mean_over(
    parts: Iterable[Sequence[int]], measure: Callable[[Sequence[int]], Mapping[Key, float]]
) -> dict[Key, float]:
    """Mean of each measure over all examples: batches count by their number of examples.  Takes no gradients.

    Args:
        parts: the batches, as indices of examples.
        measure: the means over one batch, by name.
    """
    total, sums = 0, dict[Key, float]()
    with torch.no_grad():
        for part in parts:
            total += len(part)
            for key, value in measure(part).items():
                sums[key] = sums.get(key, 0.0) + len(part) * value
    return {key: value / total for key, value in sums.items()}
