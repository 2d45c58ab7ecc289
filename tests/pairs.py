"""Products of parameters of which a short run takes enough that any two values of two parameters meet."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

from tests import BRIEF


def pairs(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises by all combinations, or by some in which each two values of two parameters stand together.

    A mistake nearly always needs one value or two that meet; CI takes all combinations.  A value may be a
    `pytest.param` with marks.
    """
    values = [list(row) for row in parameters.values()]
    chosen = _enough([len(row) for row in values]) if BRIEF else product(*(range(len(row)) for row in values))
    return pytest.mark.parametrize(
        ",".join(parameters),
        [_together([row[i] for row, i in zip(values, numbers, strict=True)]) for numbers in chosen],
    )


def _enough(counts: list[int]) -> list[tuple[int, ...]]:
    """Greedily: each time the combination with the most pairs that have not met, the first of several."""

    def meetings(numbers: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(numbers), min(2, len(counts))))

    left = list(product(*map(range, counts)))
    missing = set().union(*map(meetings, left))
    chosen = []
    while missing:
        best = max(left, key=lambda numbers: len(missing & meetings(numbers)))
        missing -= meetings(best)
        chosen.append(best)
    return sorted(chosen)


def _together(values: list[Any]) -> Any:
    held = [one if isinstance(one, type(pytest.param())) else pytest.param(one) for one in values]
    return pytest.param(*(value for one in held for value in one.values), marks=[m for one in held for m in one.marks])
