"""Merging sorted runs, overlaying values, sums of squares: against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiradelta.util.arrays import (
    WINDOW,
    RepeatedPositionError,
    all_different,
    different,
    join_sorted,
    merge_sorted,
    order_of,
    overlay_values,
    sum_of_squares,
)

RUNS = st.sets(st.integers(0, 30), max_size=12).map(sorted)


@given(st.lists(RUNS, min_size=1, max_size=4))
def test_runs_are_merged(runs: list[list[int]]):
    merged = merge_sorted([np.array(run, np.int64) for run in runs])
    assert merged.union.tolist() == sorted(set().union(*runs))
    assert [merged.union[at].tolist() for at in merged.indices] == runs
    assert merged.shared().tolist() == [sum(number in run for run in runs) > 1 for number in merged.union.tolist()]


@given(st.lists(st.integers(0, 3) | st.integers(0, 1 << 40), max_size=20))
def test_integers_are_ordered_and_equal_ones_stay_as_they_are(numbers: list[int]):
    assert order_of(np.array(numbers, np.int64)).tolist() == sorted(range(len(numbers)), key=numbers.__getitem__)


@given(st.lists(RUNS, min_size=1, max_size=4))
def test_runs_are_joined_or_the_lowest_repeated_position_is_named(runs: list[list[int]]):
    pairs = [(np.array(run, np.int64), np.array([100 * i + p for p in run], np.int64)) for i, run in enumerate(runs)]
    everything = [p for run in runs for p in run]
    repeated = [p for p in everything if everything.count(p) > 1]
    if repeated:
        with pytest.raises(RepeatedPositionError) as caught:
            join_sorted(pairs)
        assert caught.value.position == min(repeated)
        return
    positions, values = join_sorted(pairs)
    assert positions.tolist() == sorted(everything)
    assert values.tolist() == [next(100 * i + p for i, run in enumerate(runs) if p in run) for p in positions.tolist()]


def test_a_run_alone_is_what_it_was_unless_it_is_in_no_order():
    """Which costs `train` a tenth of the time of saving many small tensors."""
    values = np.array([7, 8, 9])
    positions, joined = join_sorted([(np.array([2, 5, 6]), values)])
    assert positions.tolist() == [2, 5, 6]
    assert joined is values
    positions, joined = join_sorted([(np.array([5, 6, 2]), values)])  # of adapters in PEFT's layout
    assert (positions.tolist(), joined.tolist()) == ([2, 5, 6], [9, 7, 8])
    with pytest.raises(RepeatedPositionError):
        join_sorted([(np.array([2, 2, 6]), values)])


@pytest.mark.parametrize("xp", [np, torch])
@given(RUNS, RUNS)
def test_values_are_overlaid(xp, positions: list[int], other: list[int]):
    array = np.array if xp is np else torch.tensor
    values, other_values = [-p for p in positions], [100 + p for p in other]
    arrays = (array(one, dtype=xp.int64) for one in (values, positions, other, other_values))
    found = overlay_values(xp, *arrays)
    assert found.tolist() == [100 + p if p in other else -p for p in positions]


@pytest.mark.parametrize("size", [0, 1, WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64])
def test_different_elements_are_found_in_all_windows(size, dtype):
    rng = np.random.default_rng(size)
    one = rng.integers(0, 2, size).astype(dtype)
    other = np.where(rng.random(size) < 0.01, 1 - one, one).astype(dtype)
    assert np.array_equal(different(one, other), np.flatnonzero(one != other))
    assert different(one, one).dtype == np.int64
    assert all_different(one, one + one.dtype.type(1))
    assert all_different(one, other) == bool(np.all(one != other))


def test_sums_of_squares_are_finite_and_precise():
    assert sum_of_squares(np.float32([3e38, 3e38])) == pytest.approx(2 * float(np.float32(3e38)) ** 2)
    assert sum_of_squares(np.full(1 << 20, 1e-3, np.float32)) == pytest.approx((1 << 20) * 1e-6, rel=1e-7)
