"""Sections that are cut out of others hold what encoding the same positions anew would."""

from __future__ import annotations

import numpy as np
import pytest

from shiradelta.backends.choose import choose
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.codecs.rice_cut import cut
from shiradelta.format.registry import IndexId
from tests import BRIEF

CASES = 60 if BRIEF else 600


def drawn(rng: np.random.Generator, kind: str, numel: int) -> Positions:
    """Positions below `numel`: at least one."""
    if kind == "even":
        found = np.flatnonzero(rng.random(numel) < rng.choice([0.001, 0.01, 0.1, 0.5, 0.99]))
    elif kind == "few":
        found = rng.integers(0, numel, rng.integers(1, 40))
    elif kind == "sloping":
        found = (numel * rng.random(rng.integers(1, 500)) ** 6).astype(np.int64)
    else:
        start = int(rng.integers(0, numel))
        found = np.append(np.arange(start, min(start + 5000, numel)), rng.integers(0, numel, 3))
    return np.unique(np.append(found, rng.integers(0, numel))).astype(np.int64)


@pytest.mark.parametrize("kind", ["even", "few", "sloping", "dense here"])
def test_a_run_keeps_its_positions_wherever_it_goes(kind: str):
    rng = np.random.default_rng(sum(kind.encode()))
    rice = choose("auto", (IndexId.RICE,)).index_codecs[IndexId.RICE]
    for _ in range(CASES):
        numel = int(rng.choice([50, 3000, 40_000, 1 << 17]))
        positions = drawn(rng, kind, numel)
        section = np.frombuffer(rice.encode(positions, (numel,)), np.uint8)
        first = int(rng.integers(0, positions.size))
        last = int(rng.integers(first + 1, positions.size + 1))
        shift = int(rng.choice([-positions[first], 0, rng.integers(0, numel), rng.integers(0, 1 << 34)]))
        moved = positions[first:last] + shift
        there = int(moved[-1]) + int(rng.choice([1, 2, 1000]))
        made = cut(section, positions.size, numel, first, moved, there)
        if moved[0] >> int(section[0]) > max(moved.size, 2048):
            assert made is None  # its zeros would take more than the positions
            continue
        assert made is not None
        found = Rice().decode(np.frombuffer(made, np.uint8), moved.size, (there,))  # checks all of it
        assert np.array_equal(found, moved)
