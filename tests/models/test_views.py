"""Boxes: positions of one are found in another, against NumPy's own strides."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiradelta.models.views import Box, View, move


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...], far: int) -> Box:
    """A box whose dimensions lie in each other in any order, with gaps; a `far` one needs more than 32 bits."""
    strides, reach = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = reach * draw(st.integers(1, 2)) + draw(st.sampled_from([0, 0, far]))
        reach = strides[dim] * shape[dim]
    return Box(shape, tuple(strides), draw(st.integers(0, 5)))


@given(st.data(), st.sampled_from([0, 1 << 33]))
def test_positions_move_from_box_to_box(data: st.DataObject, far: int):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    one, other = data.draw(boxes(shape, far)), data.draw(boxes(shape, far))
    cells = np.indices(shape).reshape(len(shape), -1) if shape else np.zeros((0, 1), np.int64)
    there = {
        int(one.offset + np.dot(one.strides, cell)): int(other.offset + np.dot(other.strides, cell)) for cell in cells.T
    }
    around = {position + by for position in there for by in (-1, 0, 1) if position + by >= 0}
    positions = np.array(data.draw(st.permutations(sorted(around))), np.int64)
    wanted = [(number, there[position]) for number, position in enumerate(positions.tolist()) if position in there]
    for given_as in (positions, torch.from_numpy(positions)):
        chosen, where = move(given_as, one, other)
        numbers = np.arange(positions.size)[np.asarray(chosen) if not isinstance(chosen, slice) else chosen]
        assert list(zip(numbers.tolist(), where.tolist(), strict=True)) == wanted
    view = View("", (one.span[1] + 1,), other, one, other.span[1] + 1)
    numbers, where = view.to_weight(positions)
    assert list(zip(numbers.tolist(), where.tolist(), strict=True)) == sorted(wanted, key=lambda pair: pair[1])
