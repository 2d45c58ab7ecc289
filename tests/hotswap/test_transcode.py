"""The nonzeros in each piece of a tensor's memory, from every index codec, against plain indexing."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.draw import Draw
from shiradelta.hotswap.portions import portions_of
from shiradelta.io.writer import writing_to
from shiradelta.models.views import Box, View, contiguous

ROWS, COLUMNS = 300, 400
UNEVEN = np.outer(*(np.random.default_rng(1).random(size) ** 4 for size in (ROWS, COLUMNS)))
#: Density by element, or a draw -> the index codec that is the smallest for it.
MASKS = {"RICE": 0.01, "BITMAP": 0.6, "ALL": 1.0, "TILED": 2 * UNEVEN, "SEEDED": Draw(3, 2000)}


def shown(shape: tuple[int, int], weight: Box, stored: Box, of: tuple[int, int]) -> View:
    return View("w", of, weight, stored, shape[0] * shape[1])


WHOLE = ROWS, COLUMNS
SOME_ROWS = shown((100, COLUMNS), contiguous((100, COLUMNS)), Box((100, COLUMNS), (COLUMNS, 1), 100 * COLUMNS), WHOLE)
SOME_COLUMNS = shown((ROWS, 150), contiguous((ROWS, 150)), Box((ROWS, 150), (COLUMNS, 1), 7), WHOLE)
TURNED = shown(WHOLE, Box(WHOLE, (1, ROWS), 0), contiguous(WHOLE), WHOLE)
PART = shown((5, ROWS), contiguous((5, ROWS)), Box((5, ROWS), (ROWS, 1), 3 * ROWS), (COLUMNS, ROWS))


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize(
    "zstd",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not find_spec("zstandard"), reason="zstandard is not installed")),
    ],
)
@pytest.mark.parametrize("codec", MASKS)
def test_every_piece_gets_its_nonzeros(codec: str, zstd: bool, backend: str):
    rng = np.random.default_rng(2)
    mask, draw = MASKS[codec], None
    if isinstance(mask, Draw):
        draw, positions = mask, mask.positions(ROWS * COLUMNS)[::3]
    else:
        positions = np.flatnonzero(rng.random(WHOLE) < mask)
    values = rng.standard_normal(positions.size).astype(np.float32)
    output = io.BytesIO()
    with writing_to(output, "f32", zstd=zstd) as writer:
        writer.add("w", sd.TensorDelta(WHOLE, positions, values, "float32", draw=draw))
    tensor = sd.open_delta(output.getvalue(), backend)["w"]
    assert tensor.record.index_codec_name == codec
    row, column = positions // COLUMNS, positions % COLUMNS
    wanted = {
        (SOME_ROWS,): ((row >= 100) & (row < 200), (row - 100) * COLUMNS + column),
        (SOME_COLUMNS,): ((column >= 7) & (column < 157), row * 150 + column - 7),
        (TURNED,): (row >= 0, column * ROWS + row),
        (TURNED, PART): ((column >= 3) & (column < 8), (column - 3) * ROWS + row),
    }
    found = portions_of(tensor, [(None, views) for views in wanted])  # type: ignore[misc]
    for (where, bits, _), (inside, moved) in zip(found, wanted.values(), strict=True):
        order = np.argsort(moved[inside], kind="stable")
        assert np.array_equal(where, moved[inside][order])
        assert np.array_equal(bits().view(np.float32), values[inside][order])


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize(("values", "op"), [("f32", "add"), ("bf16", "add"), ("int4", "add"), ("f32", "set")])
def test_a_run_of_rows_is_cut_out_of_both_sections(values: str, op: str, backend: str):
    rng = np.random.default_rng(4)
    positions = np.flatnonzero(rng.random(WHOLE) < 0.01)
    given = rng.standard_normal(positions.size).astype(np.float32)
    given = given if op == "add" else given.astype(np.float16)
    output = io.BytesIO()
    with writing_to(output, values) as writer:
        writer.add("w", sd.TensorDelta(WHOLE, positions, given, "float16", op))
    tensor = sd.open_delta(output.getvalue(), backend)["w"]
    (portion,) = portions_of(tensor, [(None, (SOME_ROWS,))])  # type: ignore[list-item]
    assert portion.sections is not None
    index, section = portion.sections(SOME_ROWS.numel)
    assert index is not None
    assert (section is None) == (values == "int4")  # whose groups are others
    record = tensor.record
    where = INDEX_CODECS.by_id[record.index_codec].decode(
        np.frombuffer(index, np.uint8), portion.positions.size, (100, 400)
    )
    assert np.array_equal(where, portion.positions)
    if section is not None:
        codec, data = VALUE_CODECS.by_id[record.value_codec], np.frombuffer(section, np.uint8)
        codec.check(data, where.size, record.element_size)
        found = codec.decode(data, where.size, record.element_size, 0, where.size)
        assert np.array_equal(found.view(portion.bits().dtype), portion.bits())
