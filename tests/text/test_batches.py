"""How examples are split, batched, and averaged over."""

from __future__ import annotations

import random

import pytest
import torch

from shiradelta.text.batches import batches, by_length, mean_over, split


@pytest.mark.parametrize(("count", "wish", "held"), [(100, 10, 10), (100, 30, 20), (10, 5, 2)])
def test_at_most_a_fifth_is_held_out(count: int, wish: int, held: int):
    train, held_out = split(count, wish, 0)
    assert len(held_out) == held
    assert sorted([*train, *held_out]) == list(range(count))


def test_every_text_is_in_a_batch_at_some_time():
    """The longest ones too, if they do not fill one."""
    lengths = list(range(205))
    found = batches(range(205), lengths, 128, 0)
    assert {index for _ in range(40) for index in next(found)} == set(range(205))


def test_batches_by_length_hold_every_example_once():
    lengths = random.Random(0).choices(range(20), k=33)
    parts = by_length(range(33), lengths, 8)
    assert [len(part) for part in parts] == [8, 8, 8, 8, 1]
    assert sorted(index for part in parts for index in part) == list(range(33))
    assert [lengths[index] for part in parts for index in part] == sorted(lengths)


def test_means_count_examples_not_batches():
    values = torch.arange(10.0, requires_grad=True)

    def measure(part: list[int]) -> dict[str, float]:
        mean = values[part].mean()
        assert not mean.requires_grad
        return {"mean": mean.item(), "one": 1.0}

    assert mean_over([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]], measure) == {"mean": 4.5, "one": 1.0}
