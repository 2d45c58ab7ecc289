"""One suite for all index codecs and one for all value codecs; then what is particular to each."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.codecs import INDEX_CODECS, SEEDED, VALUE_CODECS, packing, rice, struct, tiled_classes
from shiradelta.format.codecs.base import ValueCodec
from shiradelta.format.codecs.smallest import smallest_section
from shiradelta.format.draw import Draw
from shiradelta.format.registry import IndexId, ValueId
from shiradelta.util.arrays import WINDOW

Shape = tuple[int, ...]


def as_bytes(section: bytes) -> np.ndarray:
    return np.frombuffer(section, np.uint8)


# --- index codecs ---

shapes = st.one_of(
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
    st.sampled_from([(), (1,), (2048,), (2049,), (64, 32), (1, 5000), (5000, 1), (2, 3, 1, 5, 1, 2, 1, 2)]),
)
huge_shapes = st.sampled_from([((1 << 32) - 1,), (1 << 16, 1 << 16), (1 << 20, 1 << 20), (1 << 56,), (3, 1 << 50)])


@st.composite
def runs_and_points(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """Some points and some runs, at the ends too; never empty."""
    numel = math.prod(shape)
    last = numel - 1
    points = draw(st.lists(st.integers(0, last) | st.sampled_from([0, last, numel // 2]), min_size=1, max_size=30))
    starts = draw(st.lists(st.integers(0, last), max_size=4))
    lengths = [draw(st.integers(1, 700)) for _ in starts]
    runs = [np.arange(a, min(a + n, numel), dtype=np.int64) for a, n in zip(starts, lengths, strict=True)]
    return np.unique(np.concatenate([np.array(points, np.int64), *runs]))


@st.composite
def dense(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """Each element or not, with a share from nothing to everything; never empty."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    listed = rng.random(math.prod(shape)) < draw(st.sampled_from([0.01, 0.3, 0.9, 1.0]))
    listed[draw(st.integers(0, listed.size - 1))] = True
    return np.flatnonzero(listed)


@st.composite
def lines(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """The union of a few rows, columns and diagonals."""
    rows, columns = struct.matrix_shape(shape)
    chosen = []
    for kind in draw(st.lists(st.sampled_from([struct.ROW, struct.COLUMN, struct.DIAGONAL]), min_size=1, max_size=5)):
        line = draw(st.integers(*struct.line_range(kind, rows, columns)))
        chosen.append(struct.positions_in(struct.progressions([(kind, line, 1, 1)]), (0, 0, rows, columns), columns))
    return np.unique(np.concatenate(chosen))


@st.composite
def in_dense_lines(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """Each element or not, with a share that depends on its row and its column; never empty."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns = struct.matrix_shape(shape)
    share = np.outer(*(np.exp(rng.normal(0, draw(st.sampled_from([0, 1, 3])), size)) for size in (rows, columns)))
    listed = rng.random(share.size) < share.ravel() * draw(st.sampled_from([0.001, 0.1, 0.5]))
    listed[draw(st.integers(0, listed.size - 1))] = True
    return np.flatnonzero(listed)


def draws_in(shape: Shape) -> list[Draw]:
    """Draws of few cells to one in each element; `encoded` finds the one that positions are of."""
    numel = math.prod(shape)
    cells = sorted({1, min(300, numel), -(-numel // 50), -(-numel // 3), -(-2 * numel // 3), numel})
    draws = [Draw(count, count) for count in cells if count < 1 << 20]
    return [draw for draw in draws if draw.is_possible(numel)]


@st.composite
def of_a_draw(draw: st.DrawFn, shape: Shape) -> np.ndarray:
    """Some positions of a draw; never none."""
    drawn = draw(st.sampled_from(draws_in(shape))).positions(math.prod(shape))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = rng.random(drawn.size) < draw(st.sampled_from([0.02, 0.4, 0.6, 0.98, 1.0]))
    kept[draw(st.integers(0, drawn.size - 1))] = True
    return drawn[kept]


@st.composite
def positions_for(draw: st.DrawFn, id: IndexId) -> tuple[np.ndarray, Shape]:
    """Positions that the codec can hold, and the shape."""
    shape = draw(shapes)
    if id == IndexId.ALL:
        return np.arange(math.prod(shape)), shape
    if id == IndexId.STRUCT:
        return draw(lines(shape)), shape
    if id == IndexId.TILED:
        return draw(dense(shape) | in_dense_lines(shape)), shape
    if id == IndexId.SEEDED:
        shape = draw(st.just(shape) | huge_shapes.filter(draws_in))
        return draw(of_a_draw(shape)), shape
    if id == IndexId.RAW and draw(st.booleans()):
        shape = draw(huge_shapes)
        return draw(runs_and_points(shape)), shape
    return draw(runs_and_points(shape) | dense(shape) | lines(shape)), shape


#: Those that need the base's elements have tests of their own.
WITHOUT_BASE = {name: codec.id for name, codec in INDEX_CODECS.items() if not codec.needs_base}
index_codecs = pytest.mark.parametrize("id", WITHOUT_BASE.values(), ids=WITHOUT_BASE)


def encoded(id: IndexId, positions: np.ndarray, shape: Shape) -> bytes | None:
    """None where the codec does not hold the positions; those that hold any positions never say so."""
    codec = INDEX_CODECS.by_id[id]
    if id == IndexId.SEEDED:
        assert codec.size(positions, shape) is None  # without the draw
        return next(found for draw in draws_in(shape) if (found := encoded_from(draw, positions, shape)) is not None)
    if id == IndexId.TILED:  # it holds what it does not pay for, too
        return codec.encode(positions, shape)
    if codec.size(positions, shape) is None:
        assert id not in (IndexId.RICE, IndexId.RAW, IndexId.BITMAP, IndexId.ALL)
        return None
    return codec.encode(positions, shape)


def encoded_from(draw: Draw, positions: np.ndarray, shape: Shape) -> bytes | None:
    """None where the positions are not all of the draw."""
    with suppress(DeltaError):
        return SEEDED.encode_from(draw, positions, shape)
    return None


@index_codecs
@given(data=st.data())
def test_positions_come_back(id, data):
    positions, shape = data.draw(positions_for(id))
    section = encoded(id, positions, shape)
    if section is not None:
        found = INDEX_CODECS.by_id[id].decode(as_bytes(section), positions.size, shape)
        assert found.dtype == np.int64
        assert np.array_equal(found, positions)


def large_positions(id: IndexId) -> tuple[np.ndarray, Shape]:
    """Positions of several windows that the codec can hold, and the shape."""
    numel = 3 * WINDOW + 100
    if id == IndexId.ALL:
        return np.arange(numel), (numel,)
    if id == IndexId.STRUCT:
        lines = [(struct.ROW, 2, 300, 2), (struct.COLUMN, 7, 3, 60), (struct.DIAGONAL, -200, 17, 40)]
        return struct.positions_in(struct.progressions(lines), (0, 0, 1500, 2000), 2000), (1500, 2000)
    if id == IndexId.TILED:
        return tiled_positions(1200, 700)
    if id == IndexId.SEEDED:
        drawn = draws_in((numel,))[-2].positions(numel)
        return np.delete(drawn, np.s_[::5]), (numel,)
    return np.flatnonzero(np.random.default_rng(0).random(numel) < 0.5), (numel,)


def tiled_positions(rows: int, columns: int) -> tuple[np.ndarray, Shape]:
    """Half of the elements, three quarters of those in some columns, and the shape."""
    share = np.where(np.arange(columns) % 3, 0.375, 0.75)
    listed = np.random.default_rng(0).random((rows, columns)) < share
    return np.flatnonzero(listed), (rows, columns)


@index_codecs
def test_positions_come_in_windows(id):
    positions, shape = large_positions(id)
    section = encoded(id, positions, shape)
    assert section is not None
    found = list(INDEX_CODECS.by_id[id].windows(as_bytes(section), positions.size, shape))
    assert len(found) > 1
    assert max(part.size for part in found) <= WINDOW
    assert np.array_equal(np.concatenate(found), positions)


@pytest.mark.parametrize("lines", [[(0, 3, 1, 2)], [(1, 0, 1, 40), (2, -5, 1, 1)], [(0, 1, 2, 2), (2, -39, 7, 12)]])
def test_blocks_of_lines_pass_over_what_is_empty(lines, monkeypatch):
    monkeypatch.setattr(struct, "WINDOW", 16)
    kinds = struct.progressions(lines)
    parts = [struct.positions_in(kinds, block, 50) for block in struct.blocks_of(kinds, (0, 0, 40, 50))]
    assert all(part.size for part in parts)
    assert np.array_equal(np.concatenate(parts), struct.positions_in(kinds, (0, 0, 40, 50), 50))


@index_codecs
@given(data=st.data())
def test_size_is_that_of_the_section(id, data):
    positions, shape = data.draw(positions_for(id))
    section = encoded(id, positions, shape)
    if section is not None:
        size = INDEX_CODECS.by_id[id].size(positions, shape)
        assert size == len(section) or (id in (IndexId.TILED, IndexId.SEEDED) and size is None)
        assert INDEX_CODECS.by_id[id].size_is_possible(len(section), positions.size, math.prod(shape))
        assert len(section) % 4 == 0
        assert not section or section.endswith(bytes(registry.SLACK))


@pytest.mark.slow
@index_codecs
@given(data=st.data())
def test_a_part_is_a_slice_of_the_whole(id, data):
    positions, shape = data.draw(positions_for(id))
    section = encoded(id, positions, shape)
    if section is None:
        return
    ends = st.integers(0, math.prod(shape)) | st.sampled_from([0, math.prod(shape), *positions[:3].tolist()])
    start, stop = sorted([data.draw(ends), data.draw(ends)])
    rank, part = INDEX_CODECS.by_id[id].decode_between(as_bytes(section), positions.size, shape, start, stop)
    first, last = np.searchsorted(positions, [start, stop])
    assert np.array_equal(part, positions[first:last])
    assert rank == first or not part.size


@pytest.mark.slow
@index_codecs
@given(data=st.data())
def test_one_bit_of_slack_is_refused(id, data):
    positions, shape = data.draw(positions_for(id))
    section = encoded(id, positions, shape)
    if section:
        changed = np.frombuffer(section, np.uint8).copy()
        changed[-data.draw(st.integers(1, registry.SLACK))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(FormatError) as caught:
            INDEX_CODECS.by_id[id].decode(changed, positions.size, shape)
        assert caught.value.reason == "padding_not_zero"


@given(data=st.data())
def test_the_smallest_codec_is_chosen_and_ties_go_to_the_lowest_id(data):
    shape = data.draw(shapes)
    positions = data.draw(runs_and_points(shape) | dense(shape) | lines(shape))
    sizes = {id: codec.size(positions, shape) for id, codec in INDEX_CODECS.by_id.items()}
    best = min(size for size in sizes.values() if size is not None)
    assert smallest_section(positions, shape)[0] == min(id for id, size in sizes.items() if size == best)


# --- TILED ---


def test_tiled_is_chosen_where_densities_differ_by_enough():
    rng = np.random.default_rng(0)
    rows, columns = (np.exp(rng.normal(0, 1, 600)) for _ in range(2))
    listed = rng.random((600, 600)) < np.outer(rows, columns) * 0.004
    positions = np.flatnonzero(listed)
    assert smallest_section(positions, listed.shape)[0] == IndexId.TILED
    assert smallest_section(rng.permutation(listed.ravel()).nonzero()[0], listed.shape)[0] == IndexId.RICE
    assert smallest_section(np.flatnonzero(listed[:10]), (10, 600))[0] == IndexId.RICE


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.002, 0.01, 0.1])
@pytest.mark.parametrize("sides", ["rows", "columns", "both"])
def test_grids_that_pay_are_not_passed_over_unseen(sides, density, spread):
    rng, shape = np.random.default_rng(0), (600, 700)
    share = np.full(shape, density)
    if sides != "columns":
        share *= np.exp(rng.normal(0, spread, (600, 1)))
    if sides != "rows":
        share *= np.exp(rng.normal(0, spread, 700))
    positions = np.flatnonzero(rng.random(shape) < share)
    grid = tiled_classes.choose(positions, shape)
    assert grid is not None
    assert tiled_classes.lines_differ(tiled_classes.counts_in_lines(positions, shape), positions.size) >= grid[1]


def test_positions_that_are_independent_are_passed_over():
    positions = np.flatnonzero(np.random.default_rng(0).random(1 << 20) < 0.05)
    assert not tiled_classes.lines_differ(tiled_classes.counts_in_lines(positions, (1024, 1024)), positions.size)


def test_tiled_takes_the_rows_of_the_last_dimension_where_they_differ():
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(0, 1.5, (8, 64, 1))) * np.exp(rng.normal(0, 1, (1, 1, 64)))
    positions = np.flatnonzero(rng.random((8, 64, 64)) < share * 0.01)
    section = INDEX_CODECS.by_id[IndexId.TILED].encode(positions, (8, 64, 64))
    assert registry.TILED_HEAD.unpack_from(section)[4] == 64


@pytest.mark.parametrize("shape", [(1 << 40, 2), (2, 1 << 40), (1 << 30, 1 << 10), (1 << 24, 3, 5)])
def test_tiled_is_not_tried_where_lines_are_more_than_positions_can_pay_for(shape):
    assert INDEX_CODECS.by_id[IndexId.TILED].size(np.arange(0, 4000, 10), shape) is None


def test_a_part_of_tiled_does_not_look_at_other_tiles():
    positions, shape = tiled_positions(1200, 700)
    codec = INDEX_CODECS.by_id[IndexId.TILED]
    section = as_bytes(codec.encode(positions, shape)).copy()
    section[-registry.SLACK - 4096 : -registry.SLACK] = 0  # unary bits of the last tile
    rank, part = codec.decode_between(section, positions.size, shape, 700, 2100)
    assert rank == np.searchsorted(positions, 700)
    assert np.array_equal(part, positions[(positions >= 700) & (positions < 2100)])
    with pytest.raises(FormatError) as caught:
        codec.decode(section, positions.size, shape)
    assert caught.value.reason == "bad_index"


# --- RICE ---


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=40) | st.lists(st.integers(0, 40), min_size=1))
def test_best_k_is_the_smallest_of_the_best(gaps):
    costs = [sum(gap >> k for gap in gaps) + len(gaps) * k for k in range(registry.MAX_RICE_K + 1)]
    assert rice.best_k(np.array(gaps)) == costs.index(min(costs))


@pytest.mark.slow
@settings(max_examples=30)
@given(shape=huge_shapes.filter(lambda shape: math.prod(shape) <= 1 << 40), data=st.data())
def test_rice_past_32_bits(shape, data):
    positions = data.draw(runs_and_points(shape))
    codec = INDEX_CODECS.by_id[IndexId.RICE]
    section = as_bytes(codec.encode(positions, shape))
    assert np.array_equal(codec.decode(section, positions.size, shape), positions)
    start, stop = int(positions[0]), int(positions[-1])
    rank, part = codec.decode_between(section, positions.size, shape, start, stop)
    assert rank == 0
    assert np.array_equal(part, positions[:-1])


def test_rice_directory_is_exact_past_53_bits():
    # Bases that binary64 cannot tell apart: a comparison by way of float would take one for the other.
    shape, codec = (1 << 56,), INDEX_CODECS.by_id[IndexId.RICE]
    positions = (1 << 56) - 1 - np.arange(3000, dtype=np.int64)[::-1]
    section = as_bytes(codec.encode(positions, shape)).copy()
    assert np.array_equal(codec.decode(section, 3000, shape), positions)
    blocks = (int.from_bytes(section[8:16].tobytes(), "little") - 1) // registry.BLOCK_BITS
    section[registry.RICE_HEAD.size + 16 * blocks] ^= 1
    with pytest.raises(FormatError) as caught:
        codec.decode(section, 3000, shape)
    assert caught.value.reason == "bad_directory"


def rice_section(positions: list[int], numel: int) -> np.ndarray:
    return as_bytes(INDEX_CODECS.by_id[IndexId.RICE].encode(np.array(positions), (numel,))).copy()


@pytest.mark.parametrize("word", [0, 1, 2, 3], ids=["base_0", "rank_0", "base_1", "rank_1"])
@pytest.mark.parametrize("entry", [1, 5, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_a_lying_directory_cannot_lead_a_part_out_of_the_tensor(word, entry):
    numel, positions = 1 << 34, [*range(0, 6000, 2), (1 << 33) + 5]
    section = rice_section(positions, numel)
    section[16 + 8 * word : 24 + 8 * word].view("<u8")[0] = entry
    for start, stop in (0, numel), (0, 10), (4000, 6000), (1 << 33, numel):
        with suppress(FormatError):
            rank, part = rice.Rice().decode_between(section, len(positions), (numel,), start, stop)
            assert 0 <= rank <= rank + part.size <= len(positions)
            assert np.all(part[1:] > part[:-1])
            assert not part.size or start <= part[0] <= part[-1] < stop


def test_a_part_of_rice_does_not_look_at_other_blocks():
    positions = np.arange(0, 60000, 3)
    section = rice_section(positions.tolist(), 60000)
    codec, (k, unary_bits) = rice.Rice(), registry.RICE_HEAD.unpack_from(section)
    whole = codec.decode_between(section, positions.size, (60000,), 0, 900)
    unary = section.size - registry.SLACK - 4 * -(-unary_bits // 32)
    section[unary + 3 * registry.BLOCK_BITS // 8 : -registry.SLACK] = 0
    part = codec.decode_between(section, positions.size, (60000,), 0, 900)
    assert k >= 0
    assert whole[0] == part[0] == 0
    assert np.array_equal(whole[1], part[1])
    with pytest.raises(FormatError):
        codec.decode(section, positions.size, (60000,))


@given(st.integers(1, 31), st.data())
def test_bit_fields_come_back(k, data):
    fields = np.array(data.draw(st.lists(st.integers(0, (1 << k) - 1), min_size=1, max_size=100)))
    words = np.frombuffer(packing.pack_fields(fields, k), "<u4")
    start, stop = sorted([data.draw(st.integers(0, fields.size)), data.draw(st.integers(0, fields.size))])
    assert words.size == packing.field_words(fields.size, k)
    assert sum(int(word) << 32 * i for i, word in enumerate(words)) == sum(
        int(f) << k * i for i, f in enumerate(fields)
    )
    assert np.array_equal(packing.unpack_fields(words, k, start, stop), fields[start:stop])


@given(seed=st.integers(0, 2**32))
def test_fields_of_any_width_and_place(seed):
    rng = np.random.default_rng(seed)
    widths, holes = rng.integers(0, 65, 40), rng.integers(0, 70, 40)
    fields = [int(rng.integers(0, 2**64, dtype=np.uint64)) & (1 << width) - 1 for width in widths.tolist()]
    ends = np.cumsum(widths + holes)
    words = np.zeros(int(ends[-1]) // 64 + 2, np.uint64)
    packing.put_fields(words, ends - widths, np.array(fields, np.uint64))
    whole = sum(field << at for field, at in zip(fields, (ends - widths).tolist(), strict=True))
    assert int.from_bytes(words.astype("<u8").tobytes(), "little") == whole


# --- STRUCT ---


@pytest.mark.parametrize(
    ("shape", "entries"),
    [
        ((64, 60), [(struct.ROW, 1, 1, 2), (struct.ROW, 6, 4, 3)]),
        ((40, 60), [(struct.ROW, 7, 1, 1), (struct.COLUMN, 11, 1, 1), (struct.DIAGONAL, 0, 1, 1)]),
        ((30, 70), [(struct.DIAGONAL, -3, 7, 3)]),
        ((9,), [(struct.ROW, 0, 1, 1), (struct.COLUMN, 0, 1, 9)]),
    ],
)
def test_entries_are_found_by_the_rule(shape, entries):
    rows, columns = struct.matrix_shape(shape)
    assert (
        struct.find_entries(struct.positions_in(struct.progressions(entries), (0, 0, rows, columns), columns), shape)
        == entries
    )


def entries_by_the_rule(positions: np.ndarray, shape: Shape) -> list[struct.Entry] | None:
    """FORMAT.md, section 8, word by word."""
    rows, columns = struct.matrix_shape(shape)
    listed = {(p // columns, p % columns) for p in positions.tolist()}
    if len(listed) < min(rows, columns):
        return None
    row_cells = {r: {(r, c) for c in range(columns)} for r in range(rows)}
    column_cells = {c: {(r, c) for r in range(rows)} for c in range(columns)}
    diagonal_cells = {d: {(r, r + d) for r in range(rows) if 0 <= r + d < columns} for d in range(1 - rows, columns)}
    whole_rows = [r for r, cells in row_cells.items() if cells <= listed]
    whole_columns = [c for c, cells in column_cells.items() if cells <= listed]
    rest = {(r, c) for r, c in listed if r not in whole_rows and c not in whole_columns}
    diagonals = [d for d, cells in diagonal_cells.items() if cells <= listed and cells & rest]
    if not rest <= set().union(*(diagonal_cells[d] for d in diagonals)):
        return None
    entries = []
    for kind, found in (struct.ROW, whole_rows), (struct.COLUMN, whole_columns), (struct.DIAGONAL, diagonals):
        while found:
            step = found[1] - found[0] if len(found) > 1 else 1
            count = next((i for i in range(1, len(found)) if found[i] - found[i - 1] != step), len(found))
            entries.append((kind, found[0], step, count))
            found = found[count:]
    return entries if len(entries) <= registry.MAX_STRUCT_ENTRIES else None


@given(data=st.data())
def test_entries_are_those_of_the_rule(data):
    shape = data.draw(shapes.filter(lambda shape: math.prod(shape) <= 2500))
    positions = data.draw(lines(shape))
    for removed in data.draw(st.sampled_from([[], [0], [positions.size // 2]])):
        positions = np.delete(positions, removed) if positions.size > 1 else positions
    assert struct.find_entries(positions, shape) == entries_by_the_rule(positions, shape)


def test_whole_rows_are_found_across_windows():
    few = np.array([0, 5, WINDOW // 1000, WINDOW // 1000 + 1, 300])
    listed = np.zeros((400, 1000), np.bool_)
    listed[few] = True
    listed[399, 1:] = True
    assert struct.find_entries(np.flatnonzero(listed[:399]), (399, 1000)) == struct.runs(struct.ROW, few)
    assert struct.find_entries(np.flatnonzero(listed), (400, 1000)) is None


@pytest.mark.parametrize("missing", [0, 15, 29])
def test_a_line_with_a_gap_has_no_entries(missing):
    assert struct.find_entries(np.delete(np.arange(30), missing), (20, 30)) is None


def test_all_but_one_element_are_whole_lines():
    entries = struct.find_entries(np.arange(599), (20, 30))
    assert entries == [(struct.ROW, 0, 1, 19), (struct.COLUMN, 0, 1, 29)]


def test_more_than_256_progressions_are_not_tried():
    lonely = np.cumsum(np.arange(1, 600))
    assert struct.find_entries(lonely, (int(lonely[-1]) + 1, 1)) is None


# --- value codecs ---


def value_codecs_that(test: Callable[[ValueCodec], bool]) -> pytest.MarkDecorator:
    """A parameter "id", of the codecs that pass; those that need the base's elements have tests of their own."""
    chosen = {name: codec.id for name, codec in VALUE_CODECS.items() if not codec.needs_base and test(codec)}
    return pytest.mark.parametrize("id", chosen.values(), ids=chosen)


value_codecs = value_codecs_that(lambda _: True)
#: Those with parameters for each group.
quantisers = value_codecs_that(lambda codec: codec.codes_at(1) > 0)
#: A user's choices but f32, which holds every finite float32.
narrow = value_codecs_that(lambda codec: codec.option not in (None, "f32"))
magnitudes = st.floats(2.0**-20, 2.0**13, width=32) | st.sampled_from([0.0, 1.0])
ordinary = st.builds(lambda m, minus: -m if minus else m, magnitudes, st.booleans())
value_lists = st.lists(ordinary, min_size=1, max_size=300).map(lambda numbers: np.array(numbers, np.float32))
arrays = st.builds(
    lambda seed, n, scale: (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32),
    st.integers(0, 2**32),
    st.integers(1, 600),
    st.sampled_from([1e-4, 1.0, 100.0]),
)


def inputs(id: ValueId, values: np.ndarray) -> tuple[np.ndarray, int]:
    """What the codec takes, and the bytes of an element."""
    codec = VALUE_CODECS.by_id[id]
    if codec.adds:
        return values, 4
    bits = values.view(np.uint16)
    return (np.where(bits % 0x8000, bits, 1).astype(np.uint16) if codec.shifts else bits), 2


def decoded(id: ValueId, section: bytes, nnz: int, size: int, start: int = 0, stop: int | None = None):
    codec = VALUE_CODECS.by_id[id]
    codec.check(as_bytes(section), nnz, size)
    return codec.decode(as_bytes(section), nnz, size, start, nnz if stop is None else stop)


@value_codecs
@given(values=value_lists | arrays)
def test_value_section_has_its_size_and_slack(id, values):
    values, size = inputs(id, values)
    section = VALUE_CODECS.by_id[id].encode(values)
    assert VALUE_CODECS.by_id[id].size_is_possible(len(section), values.size, size)
    assert len(section) % 4 == 0
    assert section.endswith(bytes(registry.SLACK))
    assert decoded(id, section, values.size, size).size == values.size


@value_codecs
@given(values=value_lists | arrays, data=st.data())
def test_values_of_a_part_are_a_slice_of_the_whole(id, values, data):
    values, size = inputs(id, values)
    section = VALUE_CODECS.by_id[id].encode(values)
    start, stop = sorted([data.draw(st.integers(0, values.size)), data.draw(st.integers(0, values.size))])
    part = decoded(id, section, values.size, size, start, stop)
    assert part.tobytes() == decoded(id, section, values.size, size)[start:stop].tobytes()


@value_codecs_that(lambda codec: codec.idempotent)
@given(values=value_lists | arrays)
def test_what_was_read_is_written_as_it_was(id, values):
    values, size = inputs(id, values)
    section = VALUE_CODECS.by_id[id].encode(values)
    assert VALUE_CODECS.by_id[id].encode(decoded(id, section, values.size, size)) == section


@value_codecs
@given(values=value_lists, data=st.data())
def test_one_bit_of_value_slack_is_refused(id, values, data):
    values, size = inputs(id, values)
    changed = as_bytes(VALUE_CODECS.by_id[id].encode(values)).copy()
    changed[-data.draw(st.integers(1, registry.SLACK))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError) as caught:
        VALUE_CODECS.by_id[id].check(changed, values.size, size)
    assert caught.value.reason == "padding_not_zero"


@value_codecs_that(lambda codec: codec.adds)
@given(values=value_lists)
def test_signs_are_kept(id, values):
    found = decoded(id, VALUE_CODECS.by_id[id].encode(values), values.size, 4)
    kept = found != 0  # I8 rounds small ones to zero
    assert np.array_equal(np.signbit(found)[kept], np.signbit(values)[kept])
    if id != ValueId.I8:
        assert np.array_equal(np.signbit(found), np.signbit(values))


def group_of(values: np.ndarray) -> np.ndarray:
    return np.arange(values.size) // registry.GROUP


def by_group(values: np.ndarray, reduce) -> np.ndarray:
    """The group's reduced magnitude, for each value, in binary64."""
    groups = group_of(values)
    return np.array([reduce(np.abs(values[groups == g]).astype(np.float64)) for g in range(groups[-1] + 1)])[groups]


BF16 = 2.0**-8  # the largest relative error of a parameter


@given(values=value_lists | arrays)
def test_f32_is_exact_and_the_halves_are_nearest(values):
    for id, error in (ValueId.F32, 0.0), (ValueId.BF16, 2.0**-8), (ValueId.F16, 2.0**-11):
        found = decoded(id, VALUE_CODECS.by_id[id].encode(values), values.size, 4).astype(np.float64)
        assert np.all(np.abs(found - values) <= error * np.abs(values) + 2.0**-25 * (error > 0))


@given(values=value_lists | arrays)
def test_i8_is_off_by_half_a_step_at_most(values):
    found = decoded(ValueId.I8, VALUE_CODECS.by_id[ValueId.I8].encode(values), values.size, 4).astype(np.float64)
    # The largest value may lie beyond the last code, as the scale is rounded.
    bound = by_group(values, np.max) / 127 * (0.5 + 127 * BF16 / 2) * (1 + BF16)
    assert np.all(np.abs(found - values) <= bound)


@given(values=value_lists | arrays)
def test_i4_is_off_by_half_a_step_at_most(values):
    found = decoded(ValueId.I4, VALUE_CODECS.by_id[ValueId.I4].encode(values), values.size, 4).astype(np.float64)
    least, most = by_group(values, np.min), by_group(values, np.max)
    step = (most - least + least * BF16) / 7 * (1 + BF16)
    assert np.all(np.abs(np.abs(found) - np.abs(values)) <= step / 2 + 7 * step * BF16 + least * BF16)


@given(values=value_lists | arrays)
def test_sign_is_the_mean_magnitude_of_the_group(values):
    found = decoded(ValueId.SIGN, VALUE_CODECS.by_id[ValueId.SIGN].encode(values), values.size, 4).astype(np.float64)
    mean = by_group(values, np.mean)
    assert np.all(np.abs(np.abs(found) - mean) <= mean * BF16 + 2.0**-134)


@quantisers
@pytest.mark.parametrize("values", [[0.0, -0.0], [2.0**-149] * 3, [-(2.0**-133)] * 2, [2.0**-140, -1.0]])
def test_quantisers_take_zeros_and_denormals(id, values):
    array = np.array(values, np.float32)
    found = decoded(id, VALUE_CODECS.by_id[id].encode(array), array.size, 4)
    assert np.all(np.abs(found) <= np.abs(array).max())


@narrow
def test_values_that_a_codec_cannot_hold_are_an_error(id):
    largest = np.array([3.4028235e38, 3.4028235e38], np.float32)
    with pytest.raises(DeltaError, match="fit"):
        VALUE_CODECS.by_id[id].encode(largest)


def test_a_group_that_rounds_up_has_a_step_of_zero():
    # 1 + 3/512 is not a bf16; lo is above it, and the step must not become negative.
    values = np.full(3, 1 + 3 / 512, np.float32)
    assert decoded(ValueId.I4, VALUE_CODECS.by_id[ValueId.I4].encode(values), 3, 4).tolist() == [1.0078125] * 3
