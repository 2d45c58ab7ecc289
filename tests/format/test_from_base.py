"""FROM_BASE and ULP_FROM_BASE (FORMAT.md, 4.7 and 5.2): all readers take and refuse the same sections."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.from_base_classes import choose
from shiradelta.hotswap.from_base import TorchFromBase
from tests.reference import WITH_BASE, base_of, by_decoder, decoder, make_vectors, records_of

Shape = tuple[int, ...]

shapes = st.one_of(
    st.lists(st.integers(1, 30), max_size=3).map(tuple),
    st.sampled_from([(), (1,), (64, 32), (1, 900), (900, 1), (2, 3, 1, 5, 1, 2, 1, 2)]),
)
sizes = st.sampled_from([1, 2, 4, 8])
SOME = (registry.MAX_BASE_TILE // 1024 + 3, 1024)  # a tile, and three rows


@st.composite
def bases(draw: st.DrawFn, numel: int, size: int) -> np.ndarray:
    """Elements of any bits; all the same; increasing; or of few exponents, as weights are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = rng.integers(0, 256, numel * size, np.uint8).view(f"<u{size}")
    kind = draw(st.sampled_from(["random", "constant", "sorted", "normal"]))
    if kind == "constant":
        return np.full(numel, bits[0])
    if kind == "sorted":
        return np.sort(bits)
    if kind == "normal" and size > 1:
        upper = rng.standard_normal(numel).astype("<f4").view("<u4") >> np.uint32(16)
        return upper.astype(f"<u{size}") << np.array(8 * size - 16, f"<u{size}")
    return bits


@st.composite
def positions_in(draw: st.DrawFn, shape: Shape, base: np.ndarray) -> np.ndarray:
    """From one position to all, in some rows and columns and for large elements fewer; never empty."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]))
    columns = shape[-1] if shape else 1
    share = np.full((base.size // columns, columns), density)
    if draw(st.booleans()):
        share[rng.random(share.shape[0]) < 0.3] *= 0.1
        share[:, rng.random(columns) < 0.3] *= 0.3
    if draw(st.booleans()):
        keys = base & np.array((1 << 8 * base.itemsize - 1) - 1, base.dtype)
        share *= np.where(keys.reshape(share.shape) > np.median(keys), 0.05, 1)
    listed = rng.random(base.size) < share.ravel()
    listed[rng.integers(base.size)] = True
    return np.flatnonzero(listed)


@st.composite
def shifts_of(draw: st.DrawFn, count: int, size: int) -> np.ndarray:
    """Unsigned bits of shifts: all 1 or -1, few beyond, or any."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = (1 << 8 * size - 1) - 1
    magnitudes = np.minimum(rng.geometric(draw(st.sampled_from([1.0, 0.95, 0.6, 0.05])), count), most)
    far = rng.random(count) < draw(st.sampled_from([0, 0.02]))
    magnitudes[far] = np.minimum(2.0 ** rng.uniform(0, 8 * size - 1.5, far.sum()), most).astype(np.int64)
    return (magnitudes * rng.choice([-1, 1], count)).astype(f"<i{size}").view(f"<u{size}")


def as_bytes(section: bytes) -> np.ndarray:
    return np.frombuffer(section, np.uint8)


def listed_by_decoder(section: bytes, nnz: int, base: np.ndarray) -> list[int] | str:
    """What decoder.py finds, or its reason."""
    record = SimpleNamespace(tensor=SimpleNamespace(name="w"), nnz=nnz, numel=base.size, element_size=base.itemsize)
    try:
        keys = decoder.base_keys(record, {"w": base.tobytes()})
        return decoder.decode_from_base(record, decoder.Parts(section), keys)
    except decoder.Refused as refused:
        return str(refused.reason)


class TorchInSmallChunks(TorchFromBase):
    """As for a tensor of millions."""

    chunk = 200


def listed_by_codecs(section: bytes, nnz: int, shape: Shape, base: np.ndarray) -> list[int] | str:
    """What NumPy finds, or its reason; torch finds the same, in however many chunks."""
    found = reason_or(lambda: FROM_BASE.decode_on(as_bytes(section), nnz, shape, base))
    there = torch.from_numpy(base.view(f"<i{base.itemsize}" if base.itemsize > 1 else base.dtype).copy())
    for codec in TorchFromBase(), TorchInSmallChunks():
        assert reason_or(partial(codec.decode, as_bytes(section), nnz, shape, there)) == found
    return found


def reason_or(decode: Callable[[], np.ndarray | torch.Tensor]) -> list[int] | str:
    """What a decoder finds, or its reason."""
    try:
        return decode().tolist()
    except FormatError as error:
        return error.reason


def shifts_by_decoder(section: bytes, base: np.ndarray) -> list[int] | str:
    record = SimpleNamespace(tensor=SimpleNamespace(name="w"), numel=base.size, element_size=base.itemsize)
    parts = decoder.Parts(section)
    try:
        keys = decoder.base_keys(record, {"w": base.tobytes()})
        found = decoder.decode_ulp_from_base(keys, 8 * base.itemsize, parts)
        parts.finish()
    except decoder.Refused as refused:
        return str(refused.reason)
    return found


def shifts_by_numpy(section: bytes, base: np.ndarray) -> list[int] | str:
    try:
        found = ULP_FROM_BASE.decode_on(as_bytes(section), base.size, base.itemsize, base)
    except FormatError as error:
        return error.reason
    assert found.dtype == base.dtype
    return found.tolist()


# --- what is written is read ---


@given(data=st.data(), shape=shapes, size=sizes)
def test_positions_come_back(data, shape, size):
    base = data.draw(bases(math.prod(shape), size))
    positions = data.draw(positions_in(shape, base))
    section = FROM_BASE.encode_on(positions, shape, base)
    assert section is not None
    assert FROM_BASE.size_is_possible(len(section), positions.size, base.size)
    assert listed_by_codecs(section, positions.size, shape, base) == positions.tolist()
    assert listed_by_decoder(section, positions.size, base) == positions.tolist()


@given(data=st.data(), size=sizes)
def test_shifts_come_back(data, size):
    count = data.draw(st.integers(1, 400) | st.sampled_from([8191, 8192, 8193]))
    base, shifts = data.draw(bases(count, size)), data.draw(shifts_of(count, size))
    section = ULP_FROM_BASE.encode_on(shifts, base)
    assert ULP_FROM_BASE.size_is_possible(len(section), count, size)
    assert shifts_by_numpy(section, base) == shifts.tolist()
    assert shifts_by_decoder(section, base) == shifts.tolist()


def test_a_block_without_listed_shifts_has_no_stream():
    base = np.arange(3 * registry.ULP_BLOCK + 5, dtype="<u2")
    shifts = np.ones(base.size, "<i2")
    shifts[[7, 2 * registry.ULP_BLOCK, 3 * registry.ULP_BLOCK + 4]] = (5, -300, 2)
    section = ULP_FROM_BASE.encode_on(shifts.view("<u2"), base)
    assert shifts_by_numpy(section, base) == shifts_by_decoder(section, base) == shifts.view("<u2").tolist()


def test_classes_of_lines_and_elements_and_what_is_turned_are_chosen():
    """A base whose small elements nearly all change, more so in half of the columns."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((300, 200)).astype("<f4").view("<u4") >> 16).astype("<u2")
    small = base & 0x7FFF < 0x3F00
    listed = rng.random(base.shape) < np.where(small, 0.95, 0.02) * np.where(np.arange(200) % 2, 1, 0.3)
    positions, flat = np.flatnonzero(listed), base.ravel()
    grid = choose(positions, base.shape, flat, FROM_BASE.counts)
    assert grid is not None
    assert grid.thresholds.size > 0
    assert grid.column_bits > 0
    assert np.any(grid.groups >= registry.TURNED)
    section = FROM_BASE.encode_in(positions, grid, flat)
    assert listed_by_codecs(section, positions.size, base.shape, flat) == positions.tolist()
    assert listed_by_decoder(section, positions.size, flat) == positions.tolist()


@pytest.mark.parametrize("density", [0.001, 0.9])
def test_the_largest_tile_and_a_lower_one(density):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, math.prod(SOME), np.uint8)
    positions = np.flatnonzero(rng.random(base.size) < density)
    section = FROM_BASE.encode_on(positions, SOME, base)
    assert section is not None
    assert registry.FROM_BASE_HEAD.unpack_from(section)[4:6] == (1024, 1024)
    assert np.array_equal(FROM_BASE.decode_on(as_bytes(section), positions.size, SOME, base), positions)


def test_a_tile_over_the_limit_is_refused():
    """Not a vector, because of the size of its base."""
    base = np.zeros(math.prod(SOME), np.uint8)
    section = bytearray(FROM_BASE.encode_on(np.array([5]), SOME, base) or b"")
    section[4:8] = (1025).to_bytes(4, "little")
    assert listed_by_codecs(bytes(section), 1, SOME, base) == listed_by_decoder(bytes(section), 1, base) == "bad_index"


def test_a_row_over_the_limit_is_not_written():
    base = np.zeros(registry.MAX_BASE_TILE + 1, np.uint8)
    assert FROM_BASE.encode_on(np.array([5]), base.shape, base) is None


@given(seed=st.integers(0, 2**32), size=sizes)
def test_any_classes_are_read(seed, size):
    """What the independent writer makes of classes, bytes and thresholds that NumPy would not choose."""
    rng = np.random.default_rng(seed)
    (rows, columns), bits = rng.integers(1, 12, 2).tolist(), rng.integers(0, 5, 2).tolist()
    base = rng.integers(0, 256, rows * columns * size, np.uint8).view(f"<u{size}")
    classes = int(rng.integers(1, registry.MAX_BASE_CLASSES + 1))
    cells = rng.choice([0, 1, 2, 5, 31, 0x80, 0x81, 0x9F], (1 << bits[0], 1 << bits[1], classes)).tolist()
    lines = [rng.integers(0, 1 << width, count).tolist() for width, count in zip(bits, (rows, columns), strict=True)]
    thresholds = np.sort(rng.integers(0, 150 if size == 1 else 40000, classes - 1)).tolist()
    matrix = make_vectors.BaseMatrix(int(rng.integers(1, rows + 1)), *lines, thresholds, cells)
    listed = rng.random(base.size) < rng.choice([0.05, 0.5, 0.95, 1])
    listed[rng.integers(base.size)] = True
    positions = np.flatnonzero(listed).tolist()
    dtype = {1: "float8_e5m2", 2: "bfloat16", 4: "float32", 8: "float64"}[size]
    section = make_vectors.from_base(positions, base.tolist(), matrix, None, dtype).section
    assert listed_by_codecs(section, len(positions), (rows, columns), base) == positions
    assert listed_by_decoder(section, len(positions), base) == positions


# --- what is damaged, or made for another base ---


def mutated(draw: st.DataObject, section: bytes) -> bytes:
    """Some bits or bytes changed, in the head more often than elsewhere, and perhaps an end that is missing."""
    changed = bytearray(section)
    for _ in range(draw.draw(st.sampled_from([1, 1, 2, 4]))):
        last = draw.draw(st.sampled_from([min(24, len(changed)), len(changed)])) - 1
        at = draw.draw(st.integers(0, last))
        changed[at] = draw.draw(st.integers(0, 255) | st.sampled_from([changed[at] ^ 1 << bit for bit in range(8)]))
    if draw.draw(st.integers(0, 7)) == 0:
        changed = changed[: draw.draw(st.integers(0, len(changed)))]
    return bytes(changed)


EXAMPLES = 10
VECTORS = sorted(path.stem for path in WITH_BASE.glob("*.json") if path.stem != "reasons")


@given(data=st.data(), shape=shapes, size=sizes)
def test_readers_agree_on_damaged_positions(data, shape, size):
    base = data.draw(bases(math.prod(shape), size))
    positions = data.draw(positions_in(shape, base))
    section = FROM_BASE.encode_on(positions, shape, base)
    assert section is not None
    for _ in range(EXAMPLES):
        damaged = mutated(data, section)
        if FROM_BASE.size_is_possible(len(damaged), positions.size, base.size):
            found = listed_by_codecs(damaged, positions.size, shape, base)
            assert found == listed_by_decoder(damaged, positions.size, base)
            assert isinstance(found, str) or (len(found) == positions.size and found == sorted({*found}))


@given(data=st.data(), size=sizes)
def test_readers_agree_on_damaged_shifts(data, size):
    count = data.draw(st.integers(1, 300))
    base, shifts = data.draw(bases(count, size)), data.draw(shifts_of(count, size))
    section = ULP_FROM_BASE.encode_on(shifts, base)
    for _ in range(EXAMPLES):
        damaged = mutated(data, section)
        if ULP_FROM_BASE.size_is_possible(len(damaged), count, size):
            assert shifts_by_numpy(damaged, base) == shifts_by_decoder(damaged, base)


@given(data=st.data(), shape=shapes, size=sizes)
def test_readers_agree_on_another_base(data, shape, size):
    base, other = (data.draw(bases(math.prod(shape), size)) for _ in range(2))
    positions = data.draw(positions_in(shape, base))
    section = FROM_BASE.encode_on(positions, shape, base)
    assert section is not None
    found = listed_by_codecs(section, positions.size, shape, other)
    assert found == listed_by_decoder(section, positions.size, other)
    assert found == "wrong_base" or len(found) == positions.size
    shifts = data.draw(shifts_of(base.size, size))
    section = ULP_FROM_BASE.encode_on(shifts, base)
    found = shifts_by_numpy(section, other)
    assert found == shifts_by_decoder(section, other)
    assert found == "wrong_base" or len(found) == base.size


@given(data=st.data())
def test_readers_agree_on_damaged_vectors(data):
    """Classes, bytes and thresholds that NumPy would not write."""
    name = data.draw(st.sampled_from(VECTORS))
    raw = (WITH_BASE / f"{name}.shd").read_bytes()
    base = base_of(raw, (WITH_BASE / f"{name}.base").read_bytes())
    record = data.draw(st.sampled_from([record for record in records_of(raw) if record.needs_base]))
    elements = np.frombuffer(base[record.tensor.name], f"<u{record.element_size}")
    if record.tensor.index_codec == "FROM_BASE" and not record.index.zstd:
        section = raw[record.index.offset :][: record.index.stored]
        for _ in range(EXAMPLES):
            damaged = mutated(data, section)
            if FROM_BASE.size_is_possible(len(damaged), record.nnz, record.numel):
                found = listed_by_codecs(damaged, record.nnz, record.tensor.shape, elements)
                assert found == listed_by_decoder(damaged, record.nnz, elements)
    if record.tensor.value_codec == "ULP_FROM_BASE" and not record.values.zstd and record.nnz < 1000:
        section, at = raw[record.values.offset :][: record.values.stored], elements[: record.nnz]
        for _ in range(EXAMPLES):
            damaged = mutated(data, section)
            if ULP_FROM_BASE.size_is_possible(len(damaged), record.nnz, record.element_size):
                assert shifts_by_numpy(damaged, at) == shifts_by_decoder(damaged, at)


# --- decoder.py and its base ---


def test_a_base_without_the_tensor_or_of_another_size_is_wrong():
    for file in "from_base", "ulp_from_base":
        data = (WITH_BASE / f"{file}.shd").read_bytes()
        ((name, elements),) = base_of(data, (WITH_BASE / f"{file}.base").read_bytes()).items()
        assert by_decoder(data, base={}) == "wrong_base"
        for other in elements[:-2], elements + bytes(2):
            assert by_decoder(data, base={name: other}) == "wrong_base"
        assert not isinstance(by_decoder(data, base={name: elements, "other": b""}), str)


def test_the_decoder_takes_the_base_from_files(tmp_path, capsys):
    path = WITH_BASE / "from_base_beside_others.shd"
    base = base_of(path.read_bytes(), path.with_suffix(".base").read_bytes())
    for name, elements in base.items():
        places = {name: {"dtype": "BF16", "shape": [len(elements) // 2], "data_offsets": [0, len(elements)]}}
        header = json.dumps({"__metadata__": {"format": "pt"}, **places}).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + elements)
    assert decoder.main([str(path), *(str(tmp_path / name) for name in base)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert decoder.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith("refused: base_needed")
    assert decoder.main([]) == 2


def test_the_decoder_reads_zstd_where_it_is_installed(tmp_path, capsys, monkeypatch):
    file = str(tmp_path / "x.shd")
    sd.save_delta(file, {"w": sd.TensorDelta((4096,), None, np.arange(4096, dtype="f4"), "float32", "set")}, zstd=True)
    assert decoder.main([file]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == sd.open_delta(file).digest
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert decoder.main([file]) == 1
    assert capsys.readouterr().err.startswith("refused: zstd_unavailable")
    assert decoder.main(["--help"]) == 2
