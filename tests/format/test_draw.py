"""Draws of positions: what the format says of them, that they look random, and that writers compare them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.errors import ArgumentError, DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.codecs import SEEDED
from shiradelta.format.draw import Draw, common_draw
from spec import decoder

numels = st.integers(1, 3000) | st.sampled_from([1 << 32, (1 << 33) + 1, 1 << 40, registry.MAX_NUMEL])
seeds = st.integers(0, (1 << 64) - 1)


@given(numels, seeds, st.data())
def test_one_position_in_each_cell(numel: int, seed: int, data: st.DataObject):
    least = -(-numel // registry.MAX_CELL)
    draw = Draw(seed, data.draw(st.integers(least, min(numel, registry.MAX_CELLS))))
    assert draw.is_possible(numel)
    some = st.integers(0, draw.cells - 1) | st.sampled_from([0, draw.cells - 1])
    cells = sorted(data.draw(st.sets(some, min_size=1, max_size=20)))
    for cell, position in zip(cells, draw.at(np.array(cells), numel).tolist(), strict=True):
        assert cell * numel // draw.cells <= position < (cell + 1) * numel // draw.cells
        assert position == decoder.drawn(seed, cell, draw.cells, numel)
        assert draw.cell_of(position, numel) == cell
    if draw.cells <= 3000:
        positions = draw.positions(numel)
        assert positions.dtype == np.int64
        assert np.array_equal(draw.cells_of(positions, numel), np.arange(draw.cells))


@pytest.mark.parametrize(
    ("numel", "cells"),
    [(10, 0), (10, 11), (1 << 33, 1 << 32), ((1 << 32) + 1, 1), (registry.MAX_NUMEL, (1 << 24) - 1)],
)
def test_what_could_overflow_is_no_draw(numel: int, cells: int):
    assert not Draw(0, cells).is_possible(numel)
    with pytest.raises(DeltaError, match="not of"):
        Draw(0, cells).cells_of(np.array([3]), numel)


@pytest.mark.parametrize("size", [2, 3, 20, 100, 1000])
def test_places_in_cells_are_uniform_and_independent(size: int):
    """Pairs of places, of neighbours, of cells a row apart, and of draws of neighbouring seeds, by chi-square."""
    cells, bins = 1 << 17, min(size, 16)
    for seed in (0, 1, 0x5DEECE66D):
        places = [Draw(s, cells).positions(cells * size) - np.arange(cells) * size for s in (seed, seed + 1)]
        first, other = (place * bins // size for place in places)
        weight = np.bincount(np.arange(size) * bins // size) / size
        for one, two in (
            (first[1:], first[:-1]),
            (first[41:], first[:-41]),
            (first[1024:], first[:-1024]),
            (first, other),
        ):
            seen = np.bincount(one * bins + two, minlength=bins * bins)
            expected = np.outer(weight, weight).reshape(-1) * one.size
            statistic = float((np.square(seen - expected) / expected).sum())
            freedom = bins * bins - 1
            assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def drawn_delta(tmp_path: Path, positions: np.ndarray, draw: Draw | None, numel: int = 5000) -> sd.Delta:
    path = tmp_path / "d.shd"
    tensor = sd.TensorDelta((numel,), positions, np.ones(positions.size, np.float32), "bfloat16", draw=draw)
    sd.save_delta(path, {"w": tensor}, values="f32")
    return sd.open_delta(path)


def test_a_file_names_the_draw_that_its_writer_was_told(tmp_path: Path):
    draw = Draw(11, 300)
    positions = draw.positions(5000)
    for some in positions, positions[::7], np.delete(positions, [4, 77]):
        plain = drawn_delta(tmp_path, some, None)
        assert plain["w"].draw is None
        assert plain["w"].record.index_codec_name == "RICE"
        delta = drawn_delta(tmp_path, some, draw)
        assert delta["w"].draw == draw
        assert delta["w"].record.index_codec_name == "SEEDED"
        assert delta.version == "1.1"
        assert delta.digest == plain.digest
        assert np.array_equal(delta["w"].positions(), some)
        assert delta["w"].record.index.decoded < plain["w"].record.index.decoded


def test_a_draw_is_left_out_where_it_is_no_smaller(tmp_path: Path):
    assert drawn_delta(tmp_path, np.arange(300), Draw(1, 300), 300)["w"].record.index_codec_name == "ALL"
    draw = Draw(1, 4)
    assert drawn_delta(tmp_path, draw.positions(5000)[:1], draw)["w"].record.index_codec_name == "RAW"


@pytest.mark.parametrize("draw", [Draw(12, 300), Draw(11, 301), Draw(11, 0)])
def test_a_wrong_draw_is_refused_and_nothing_is_written(tmp_path: Path, draw: Draw):
    with pytest.raises(DeltaError, match=r"tensor 'w': position \d+ or one after it is not of"):
        drawn_delta(tmp_path, Draw(11, 300).positions(5000), draw)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("draw", [Draw(-1, 300), Draw(1 << 64, 300), Draw(1.5, 300), Draw(11, 300.0), Draw("a", 300)])  # type: ignore[arg-type]
def test_what_is_no_seed_or_no_number_of_cells_is_refused_as_an_argument(tmp_path: Path, draw: Draw):
    with pytest.raises(ArgumentError, match=r"draw is Draw\(.*\); give a Draw of a seed"):
        drawn_delta(tmp_path, Draw(11, 300).positions(5000), draw)


def test_one_position_beside_the_draw_is_refused(tmp_path: Path):
    draw = Draw(11, 300)
    for at in 0, 150, 299:
        positions = draw.positions(5000)
        positions[at] += 1 if positions[at] < 4999 and positions[at] + 1 not in positions else -1
        with pytest.raises(DeltaError, match="not of"):
            drawn_delta(tmp_path, positions, draw)


def test_a_draw_that_cannot_be_is_refused_by_name(tmp_path: Path):
    delta = drawn_delta(tmp_path, Draw(11, 300).positions(5000), Draw(11, 300))
    section = np.frombuffer(registry.SEEDED_HEAD.pack(11, 299) + bytes(8), np.uint8)
    with pytest.raises(FormatError) as caught:
        SEEDED.decode(section, delta.nnz, (5000,))
    assert caught.value.reason == "bad_index"


def test_a_common_draw():
    def of(draw: Draw | None) -> sd.TensorDelta:
        return sd.TensorDelta((9,), [3], [1.0], draw=draw)

    assert common_draw([of(Draw(1, 2)), of(Draw(1, 2))]) == Draw(1, 2)
    assert common_draw([of(Draw(1, 2)), of(Draw(1, 3))]) is None
    assert common_draw([of(Draw(1, 2)), of(None)]) is None
    assert common_draw([]) is None
