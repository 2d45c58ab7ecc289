"""Where classes of the base's elements begin: the cheapest of all ways, which brute force finds, too."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from shiradelta.format import registry
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE, base_classes
from shiradelta.format.codecs.base_classes import KEYS, round_step, thresholds
from shiradelta.format.codecs.from_base import HEAD


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("turns", [False, True])
def test_the_cheapest_classes_are_found(seed: int, turns: bool):
    rng = np.random.default_rng(seed)
    edges = np.union1d(np.arange(0, 7) * 128, rng.integers(1, 700, 2))
    elements = rng.integers(0, 400, edges.size)
    elements[0] += 1
    listed = rng.binomial(elements, rng.random(edges.size) ** 3)
    bits = rng.integers(0, 300, (edges.size, 3)).astype(float)

    def cost(cuts: tuple[int, ...]) -> float:
        total = 0.0
        for start, stop in zip((0, *cuts), (*cuts, edges.size), strict=True):
            all_, some = (each[start:stop].sum(keepdims=True) for each in (elements, listed))
            some = np.minimum(some, all_ - some) if turns else some
            total += float(base_classes._gap_bits(all_, some)[0]) + bits[start:stop].sum(axis=0).min()
            total += base_classes._CLASS_COST + 2 * base_classes._COUNT_COST
            total += base_classes._ODD_COST * bool(edges[start] % 128)
        return total

    bits[elements == 0] = 0
    at = np.flatnonzero(elements)[1:]
    ways = (cuts for count in range(at.size + 1) for cuts in combinations(at.tolist(), count))
    found = thresholds(edges, elements, listed, 2, 2, bits=bits, turns=turns)
    chosen = tuple(np.searchsorted(edges, found).tolist())
    assert np.array_equal(edges[list(chosen)], found)
    assert cost(chosen) == pytest.approx(min(map(cost, ways)), rel=1e-12)


def test_there_are_never_more_classes_than_a_file_holds():
    edges = np.arange(0, KEYS, 128)
    elements = np.full(edges.size, 100_000)
    listed = np.where(np.arange(edges.size) % 2, 1, 40_000)
    assert thresholds(edges, elements, listed, 2, 1).size == registry.MAX_BASE_CLASSES - 1


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4", "<u8"])
def test_shifts_begin_their_classes_at_round_keys(dtype: str):
    size = np.dtype(dtype).itemsize
    shift = max(8 * size - 16, 0)
    keys = np.repeat(np.arange(4, 12) * round_step(size), 300)
    shifts = np.where(keys < 7 * round_step(size), 2, 1).astype(dtype)
    section = ULP_FROM_BASE.encode_on(shifts, keys.astype(dtype) << np.array(shift, dtype))
    classes = section[0]
    found = np.frombuffer(section, "<u2", classes - 1, 16)
    assert found.tolist() == [7 * round_step(size)]  # below, all are listed; from there on none


def test_a_threshold_that_is_not_round_is_taken_where_it_pays():
    base = np.random.default_rng(0).integers(0, KEYS, 40_000).astype("<u2")
    positions = np.flatnonzero(base < 0x1234)
    section = FROM_BASE.encode_on(positions, (200, 200), base)
    assert section is not None
    assert np.frombuffer(section, "<u2", section[2] - 1, HEAD.size).tolist() == [0x1234]
    assert len(section) < 100


def test_rows_have_classes_where_these_compress():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6000, 64)).astype("<f4").view("<u4") >> 16
    base = base.astype("<u2").reshape(-1)
    seen = np.flatnonzero(rng.random((6000, 64)) * (rng.random(6000) < 0.02)[:, None] > 0.9)
    assert seen.size < 6064
    section = FROM_BASE.encode_on(seen, (6000, 64), base)
    assert section is not None
    assert section[0] > 0  # bits of a row's class
