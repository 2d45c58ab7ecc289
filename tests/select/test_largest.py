"""The largest numbers, in NumPy and in torch: the same rule, but for ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiradelta.select.largest import largest as numpy_largest
from shiradelta.select.largest_torch import largest, largest_mask, largest_of_all, largest_of_groups


@pytest.mark.parametrize(("size", "count"), [(7, 3), (1, 1), (0, 0), (30, 30), (12, 20), (5, 0)])
def test_the_largest_are_kept(size: int, count: int):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    mask = largest_mask(scores, count)
    assert sorted(scores[mask].tolist()) == scores.sort().values[max(0, size - count) :].tolist()
    assert torch.equal(largest(scores, count), mask.nonzero().reshape(-1))
    assert np.array_equal(numpy_largest(scores.numpy(), count), mask.nonzero().reshape(-1))


def test_numpy_takes_the_lowest_of_equal_numbers():
    numbers = np.array([1, 3, 2, 3, 2, 2, 0], np.float32)
    assert numpy_largest(numbers, 3).tolist() == [1, 2, 3]
    assert numpy_largest(numbers, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 37, 300, 1000, 2000])
def test_torch_takes_as_many_of_equal_numbers_whether_sorted_or_not(count: int):
    numbers = torch.randint(0, 8, (1000,), generator=torch.Generator().manual_seed(0)).float()
    found = largest(numbers, count)
    assert bool((found.diff() > 0).all())
    assert torch.equal(found, numbers.topk(min(count, 1000), sorted=True).indices.sort().values)


def test_the_largest_of_all_tensors_together():
    scores = list(torch.rand(90, generator=torch.Generator().manual_seed(1)).split([50, 0, 40]))
    found = largest_of_all(scores, 20)
    chosen = torch.cat([score[positions] for score, positions in zip(scores, found, strict=True)])
    assert sorted(chosen.tolist()) == torch.cat(scores).sort().values[-20:].tolist()


def test_groups_of_a_row_the_last_one_shorter():
    scores = torch.arange(10.0)  # rows of 5: groups of 3 and 2
    assert largest_of_groups(scores, 5, 1, 3).tolist() == [2, 4, 7, 9]
    assert largest_of_groups(scores, 5, 3, 3).tolist() == list(range(10))
