"""Any two values of two parameters meet in what a short run takes of a product."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairs import _enough


@pytest.mark.parametrize("counts", [[3, 4, 6], [2, 2, 2, 3], [5, 2], [1, 1, 1], [4]])
def test_each_two_values_meet_in_few_combinations(counts: list[int]):
    chosen = _enough(counts)
    for (one, first), (other, second) in combinations(enumerate(counts), 2):
        assert {(row[one], row[other]) for row in chosen} == set(product(range(first), range(second)))
    assert {row[-1] for row in chosen} == set(range(counts[-1]))
    assert len(set(chosen)) == len(chosen)


def test_they_are_few():
    assert len(_enough([3, 4, 6])) == 4 * 6
