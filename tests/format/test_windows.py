"""Nonzeros read in windows are those that are read at once."""

from __future__ import annotations

import numpy as np
import pytest

from shiradelta import TensorDelta
from shiradelta.format.windows import Cursor, windows_of
from shiradelta.util.arrays import WINDOW, aligned

NUMEL = 3 * WINDOW


def delta(seed: int, share: float) -> TensorDelta:
    """A SET of a share of the elements."""
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(NUMEL) < share)
    return TensorDelta(
        (NUMEL,), positions, generator.integers(0, 1 << 16, positions.size, np.uint16), "bfloat16", "set"
    )


def test_windows_hold_everything_once():
    tensor = delta(0, 0.9)
    windows = list(windows_of(tensor))
    assert len(windows) == 3
    assert np.array_equal(np.concatenate([positions for positions, _ in windows]), tensor.positions())
    assert np.array_equal(np.concatenate([bits for _, bits in windows]), tensor.bits())


def test_windows_that_are_cut_differently_are_aligned():
    positions, values = np.arange(20), np.arange(20) * 2
    pairs = list(aligned(iter(np.split(positions, [0, 7, 7, 8])), iter(np.split(values, [1, 3, 4, 19]))))
    assert [own.size for own, _ in pairs] == [7, 1, 12]
    assert all(np.array_equal(part, own * 2) for own, part in pairs)


def test_a_cursor_reads_each_nonzero_once():
    tensor = delta(1, 0.9)
    cursor, positions = Cursor(tensor), tensor.positions()
    before = 0
    for stop in (0, 1, 5, 5, WINDOW + 3, NUMEL - 1, NUMEL, NUMEL):
        runs = list(cursor.until(stop))
        found = np.concatenate([np.zeros(0, np.int64), *(own for own, _ in runs)])
        assert np.array_equal(found, positions[(positions >= before) & (positions < stop)])
        before = stop


@pytest.mark.parametrize("other", [(2, 0.5), (3, 0.9), (4, 0.0001)])
def test_what_is_overlaid_is_what_the_delta_lists(other: tuple[int, float]):
    """The same positions, others, and far fewer than are looked at."""
    tensor, own = delta(*other), delta(3, 0.9)
    dense = np.zeros(NUMEL, np.uint16)
    dense[tensor.positions()] = tensor.bits()
    cursor = Cursor(tensor)
    for positions, _ in windows_of(own):
        view = np.zeros(positions.size, np.uint16)
        cursor.overlay(positions, view)
        assert np.array_equal(view, dense[positions])
