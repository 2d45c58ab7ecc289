"""libshd under Python: the same bits as the NumPy reference, tensor by tensor, and a clear word without it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta
from shiradelta import TensorDelta
from shiradelta.backends.choose import FILE_BACKENDS, choose
from shiradelta.backends.libshd import library
from shiradelta.backends.libshd.backend import backend
from shiradelta.backends.libshd.decoder import NativeDecoder, apply_sum
from shiradelta.backends.numpy import NUMPY, NumpyDecoder, at_least
from shiradelta.errors import ArgumentError, FormatError, ShiraDeltaError
from shiradelta.format import container, header, registry
from shiradelta.format.arithmetic import Positions, add, fingerprint, scaled
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS, VALUE_OPTIONS
from shiradelta.format.record import Record
from shiradelta.format.table import Table
from shiradelta.util.arrays import WINDOW, distinct
from tests.pairs import pairs
from tests.reference import VALID

try:
    LIBSHD = backend()
except ShiraDeltaError as error:
    pytest.skip(str(error), allow_module_level=True)

CODECS = [option for option, codec in VALUE_OPTIONS.items() if codec.id in LIBSHD.value_codecs]
REFERENCE = NUMPY.name
OTHERS = [name for name in FILE_BACKENDS if name != REFERENCE]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype.itemsize == b.dtype.itemsize and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_every_vector_decodes_to_the_same_bits(other: str):
    for path in sorted(VALID.glob("*.shd")):
        assert_decodes_to_the_same_bits(path, other)


def assert_decodes_to_the_same_bits(path: Path, other: str) -> None:
    generator = np.random.default_rng(0)
    slow = shiradelta.open_delta(path, backend=REFERENCE)
    fast = shiradelta.open_delta(path, backend=other)
    fast.verify()
    for name in slow:
        assert same_bits(fast[name].positions(), slow[name].positions())
        assert same_bits(fast[name].bits(), slow[name].bits())
        rows = slow[name].shape[0] if len(slow[name].shape) > 1 else 1
        for start, stop in [
            (0, rows),
            *np.sort(generator.integers(0, min(rows, 1 << 40) + 1, (4, 2)), axis=1).tolist(),
        ]:
            for left, right in zip(fast[name].rows(start, stop), slow[name].rows(start, stop), strict=True):
                assert same_bits(left, right)


@pytest.mark.parametrize("density", [0.0003, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", [pytest.param((700, 900), marks=pytest.mark.slow), (140, 180), (3,), (5, 7, 11)])
def test_files_are_the_same_bytes(tmp_path: Path, density: float, shape: tuple[int, ...]):
    generator = np.random.default_rng(1)
    numel = int(np.prod(shape))
    positions = np.flatnonzero(generator.random(numel) < density)
    tensor = TensorDelta(shape, positions, generator.standard_normal(positions.size).astype(np.float32) ** 3)
    for values in CODECS:
        for name in FILE_BACKENDS:
            shiradelta.save_delta(tmp_path / name, {"w": tensor}, values=values, backend=name)
        assert len({(tmp_path / name).read_bytes() for name in FILE_BACKENDS}) == 1, values


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("values", CODECS)
def test_patches_are_the_same_bits(tmp_path: Path, dtype: str, values: str):
    """Over all kinds of weights: denormals, infinities, NaN of every payload.  A fused multiply-add would be seen."""
    generator = np.random.default_rng(2)
    shape, unsigned = (300, 500), UNSIGNED[4 if dtype == "float32" else 2]
    weight = generator.integers(0, np.iinfo(unsigned).max, 150_000, dtype=unsigned, endpoint=True)
    positions = np.flatnonzero(generator.random(weight.size) < 0.2)
    tensor = TensorDelta(shape, positions, generator.standard_normal(positions.size).astype(np.float32), dtype)
    shiradelta.save_delta(tmp_path / "d.shd", {"w": tensor}, values=values)
    for strength in (1.0, -0.37, 1e-30, 3e38):
        patched = {}
        for name in FILE_BACKENDS:
            patched[name] = weight.copy()
            with shiradelta.open_delta(tmp_path / "d.shd", backend=name) as delta:
                delta["w"].patch(patched[name], dtype, strength)
        assert all(same_bits(patched[name], patched[REFERENCE]) for name in OTHERS), strength


def test_apply_saves_and_revert_restores(tmp_path: Path):
    generator = np.random.default_rng(3)
    weight = generator.integers(0, 1 << 16, 1_000_000, dtype=np.uint16)
    positions = np.flatnonzero(generator.random(weight.size) < 0.25)  # enough for several threads
    tensor = TensorDelta((1000, 1000), positions, generator.standard_normal(positions.size).astype(np.float32))
    shiradelta.save_delta(tmp_path / "d.shd", {"w": tensor}, values="int8")
    with shiradelta.open_delta(tmp_path / "d.shd", backend="libshd") as delta:
        record = delta["w"].record
        loaded = delta.decoder.load(record)
        patched, saved = weight.copy(), np.empty(positions.size, np.uint16)
        loaded.apply(patched, "bfloat16", 0.7, saved)
        assert same_bits(saved, weight[positions])
        assert not same_bits(patched, weight)
        loaded.revert(patched, "bfloat16", saved)
    assert same_bits(patched, weight)


def summed(bits: np.ndarray, dtype: str, addends: list[tuple[TensorDelta, float]]) -> np.ndarray:
    """FORMAT.md, 6.2, dense and in NumPy."""
    total, touched = np.zeros(bits.size, np.float32), np.zeros(bits.size, np.bool_)
    with np.errstate(all="ignore"):
        for tensor, strength in addends:
            at, contribution = tensor.positions(), scaled(tensor.values(), strength)
            total[at] = np.where(touched[at], total[at] + contribution, contribution)
            touched[at] = True
    return np.where(touched, add(bits, dtype, total), bits)


@pairs(
    dtype=["float32", "float16", "bfloat16"],
    count=[1, 2, 5, pytest.param(70, marks=pytest.mark.slow)],
    same=[False, True],
)
def test_sums_are_the_same_bits(tmp_path: Path, dtype: str, count: int, same: bool):
    """On several threads, of all codecs and of densities from one nonzero to all, over all kinds of weights."""
    generator = np.random.default_rng(count)
    unsigned = UNSIGNED[4 if dtype == "float32" else 2]
    weight = generator.integers(0, np.iinfo(unsigned).max, 150_000, dtype=unsigned, endpoint=True)
    loaded, tensors = [], []
    for i in range(count):
        density = 0.2 if same else (1.0, 0.01, 0.3, 1e-5)[i % 4]
        rng = np.random.default_rng(0 if same else i)
        positions = distinct(np.append(np.flatnonzero(rng.random(weight.size) < density), 149_999))
        values = generator.standard_normal(positions.size).astype(np.float32)
        path, codec = tmp_path / f"{i}.shd", CODECS[i % len(CODECS)]
        shiradelta.save_delta(path, {"w": TensorDelta((300, 500), positions, values, dtype)}, values=codec)
        delta = shiradelta.open_delta(path, backend="libshd")
        loaded.append(delta.decoder.load(delta["w"].record))
        tensors.append(delta["w"])
    patched = weight.copy()
    saved = [np.empty(tensor.nnz, unsigned) for tensor in tensors]
    for again, scale in enumerate((1.0, -0.3, 3e38)):
        strengths = (scale * generator.uniform(-1, 1, count)).tolist()
        apply_sum(list(zip(loaded, strengths, saved, strict=True)), patched, dtype, from_saved=again > 0)
        assert same_bits(patched, summed(weight, dtype, list(zip(tensors, strengths, strict=True))))
        for tensor, old in zip(tensors, saved, strict=True):
            assert same_bits(old, weight[tensor.positions()])
    for tensor, old in zip(loaded, saved, strict=True):
        tensor.revert(patched, dtype, old)
    assert same_bits(patched, weight)


def test_misaligned_weights_fall_back(tmp_path: Path):
    tensor = TensorDelta((8,), [1, 3], [1.0, 2.0], "float32")
    shiradelta.save_delta(tmp_path / "d.shd", {"w": tensor}, values="f32")
    raw = np.zeros(33, np.uint8)
    with shiradelta.open_delta(tmp_path / "d.shd", backend="libshd") as delta:
        delta["w"].patch(raw[1:].view("<u4"), "float32")
    assert raw[1:].copy().view("<f4").tolist() == [0, 1, 0, 2, 0, 0, 0, 0]


@given(st.lists(st.integers(0, (1 << 56) - 1), unique=True, max_size=50), st.sampled_from([1, 2, 4, 8]))
def test_fingerprints_are_the_same(positions: list[int], size: int):
    at = np.array(sorted(positions), np.int64)
    bits = np.random.default_rng(0).integers(
        0, np.iinfo(UNSIGNED[size]).max, at.size, dtype=UNSIGNED[size], endpoint=True
    )
    assert LIBSHD.fingerprint(at, bits) == fingerprint(at, bits)


@given(st.lists(st.floats(width=32), max_size=200), st.floats(min_value=0.0009765625, max_value=2.0**90, width=32))
def test_selection_is_the_same(values: list[float], threshold: float):
    x = np.array(values, np.float32)
    assert LIBSHD.at_least(x, threshold).tolist() == at_least(x, threshold).tolist()


def test_a_damaged_section_has_reason_tensor_offset_and_file(tmp_path: Path):
    shiradelta.save_delta(tmp_path / "d.shd", {"w": TensorDelta((64,), [3, 9], [1.0, 2.0])})
    data = bytearray((tmp_path / "d.shd").read_bytes())
    with shiradelta.open_delta(bytes(data)) as delta:
        data[delta["w"].record.values.offset] ^= 1
    (tmp_path / "d.shd").write_bytes(data)
    for name in FILE_BACKENDS:
        with (
            shiradelta.open_delta(tmp_path / "d.shd", backend=name) as delta,
            pytest.raises(FormatError, match="section_checksum") as caught,
        ):
            delta["w"].values()
        assert caught.value.tensor == "w"
        assert caught.value.file == str(tmp_path / "d.shd")
        assert caught.value.offset is not None


def test_tables_that_the_library_accepts_are_read_as_the_reference_reads_them():
    for path in sorted(VALID.glob("*.shd")):
        data = np.fromfile(path, np.uint8)
        slow, fast = container.parse(data), container.parse(data, None, LIBSHD.accepts)
        assert LIBSHD.accepts is not None
        assert LIBSHD.accepts(slow.data), path
        assert replace(fast, data=None) == replace(slow, data=None), path
        assert same_bits(fast.data, slow.data)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [(7, "unknown_dtype"), (8, "unknown_op"), (9, "unknown_index_codec"), (10, "unknown_value_codec")],
)
def test_an_id_that_only_another_library_knows_is_refused(tmp_path: Path, offset: int, reason: str):
    shiradelta.save_delta(tmp_path / "d.shd", {"w": TensorDelta((64,), [3, 9], [1.0, 2.0])})
    data = np.fromfile(tmp_path / "d.shd", np.uint8)
    data[registry.HEADER_SIZE + offset] = 255
    with pytest.raises(FormatError) as caught:
        container.parse(data, None, lambda data: True)
    assert (caught.value.reason, caught.value.tensor) == (reason, "w")


@pytest.mark.parametrize("size", [0, 100, 1 << 15, 100_001])
@pytest.mark.parametrize("kind", [bytes, np.array])
def test_checksums_are_zlibs(size: int, kind: Callable[[np.ndarray], np.ndarray | bytes]):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert header.crc32(kind(data)) == zlib.crc32(data.data)
    assert header.crc32(kind(data), 12345) == zlib.crc32(data.data, 12345)


@pytest.mark.parametrize("name", FILE_BACKENDS)
def test_several_tensors_are_checked_at_once(tmp_path: Path, name: str):
    tensor = TensorDelta((8,), np.array([3]), np.ones(1, np.float32))
    noise = TensorDelta((4096,), np.arange(0, 4096, 2), np.ones(2048, np.float32))
    shiradelta.save_delta(tmp_path / "d.shd", {"a": tensor, "b": noise, "c": tensor}, zstd=True)
    data = bytearray((tmp_path / "d.shd").read_bytes())
    with shiradelta.open_delta(bytes(data), backend=name) as delta:
        records = [one.record for one in delta.values()]
        assert records[1].values.zstd, "one needs memory"
        delta.decoder.check_of(np.arange(3))()
    data[records[2].values.offset] ^= 1
    with shiradelta.open_delta(bytes(data), backend=name) as delta, pytest.raises(FormatError) as raised:
        delta.decoder.check_of(np.arange(3))()
    assert (raised.value.reason, raised.value.tensor) == ("section_checksum", "c")
    assert raised.value.offset == records[2].values.offset


def test_a_file_that_the_library_refuses_is_a_format_error():
    with pytest.raises(FormatError) as caught:
        NativeDecoder(np.zeros(200, np.uint8), "d.shd", Table(b"", b""))
    assert (caught.value.reason, caught.value.file) == ("bad_magic", "d.shd")


def test_backends_are_chosen_by_name():
    assert choose().name == "libshd"
    assert [choose(name).name for name in FILE_BACKENDS] == list(FILE_BACKENDS)
    with pytest.raises(ArgumentError, match=", ".join(["auto", *FILE_BACKENDS])):
        choose("cuda")


def test_the_library_knows_the_codecs_of_the_specification():
    assert LIBSHD.index_codecs.keys() == INDEX_CODECS.by_id.keys()
    assert LIBSHD.value_codecs.keys() == VALUE_CODECS.by_id.keys()


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch):
    """The library is looked for anew, during the test and after it."""
    for function in (library.library, backend):
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in (library.library, backend):
        function.cache_clear()


@pytest.mark.parametrize(
    ("path", "abi", "message"),
    [
        ("nowhere.so", 1, "is not installed"),
        (__file__, 1, "cannot be loaded"),
        (None, 999, "has ABI 1, this package needs 999"),
    ],
)
def test_without_a_fitting_library(reloaded: pytest.MonkeyPatch, path: str | None, abi: int, message: str):
    if path is not None:
        reloaded.setenv("SHIRADELTA_LIBSHD", path)
    reloaded.setattr(library, "ABI", abi)
    with pytest.raises(ShiraDeltaError, match=message):
        choose("libshd")
    assert choose("auto") is NUMPY
    assert message in library.describe_system()["why"]


@pytest.mark.parametrize("nonzeros", [9, 2 * WINDOW])
def test_damage_that_is_found_late_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nonzeros: int):
    def damaged(self: NumpyDecoder, record: Record) -> Iterator[Positions]:
        yield np.arange(5)
        raise FormatError("bad_directory")

    values, weight = np.ones(nonzeros, np.float32), np.zeros(nonzeros, np.uint32)
    shiradelta.save_delta(tmp_path / "d.shd", {"w": TensorDelta(values.shape, None, values, "float32")}, values="f32")
    monkeypatch.setattr(NumpyDecoder, "position_windows", damaged)
    with shiradelta.open_delta(tmp_path / "d.shd", backend="numpy") as delta, pytest.raises(FormatError):
        delta["w"].patch(weight, "float32")
    assert not weight.any()
