"""Files: what is written comes back, in any way of reading, and nothing is half-written."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.errors import ArgumentError, DeltaError, FormatError, ShiraDeltaError, TargetError
from shiradelta.format import arithmetic, registry
from shiradelta.format.codecs import INDEX_CODECS, VALUE_OPTIONS
from shiradelta.format.codecs.smallest import smallest_section
from shiradelta.format.delta import matrix_shape
from shiradelta.format.digest import tensor_digest
from shiradelta.format.draw import Draw
from shiradelta.io.writer import writing_to
from shiradelta.util.threads import ahead
from tests.reference import VALID, by_decoder, contents

VALUES = list(VALUE_OPTIONS)


def random_delta(shape: tuple[int, ...] = (64, 96), count: int = 500, seed: int = 0, **more) -> sd.TensorDelta:
    rng = np.random.default_rng(seed)
    positions = np.unique(rng.integers(0, np.prod(shape, dtype=np.int64), count))
    return sd.TensorDelta(shape, positions, rng.standard_normal(positions.size), **more)


@st.composite
def deltas(draw: st.DrawFn) -> sd.TensorDelta:
    """Any operation, any dtype it takes, any shape."""
    op = draw(st.sampled_from(["add", "set", "new", "drop", "replace"]))
    dtypes = [dtype.name for dtype in registry.DTYPES]
    dtype = draw(st.sampled_from(sorted(registry.ADDABLE) if op == "add" else dtypes[op != "drop" :]))
    shape = draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    numel = int(np.prod(shape))
    positions = sorted(draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    count = numel if op in ("new", "replace") else len(positions)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = registry.DTYPE_OF_NAME[dtype].size
    if op in ("set", "new", "replace"):
        values = rng.integers(0, 256, count * size).astype(np.uint8).view(f"<u{size}")
    else:
        values = rng.standard_normal(count).astype(np.float32)
    return sd.TensorDelta(shape, None if op in ("new", "replace") else positions, values, dtype, op)


names = st.text(st.characters(min_codepoint=0x20, exclude_characters="\x7f", exclude_categories=["Cs"]), min_size=1)
metadata = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), names, max_size=4)


def written(tensors: Mapping[str, sd.TensorDelta], folder, **options) -> bytes:
    path = folder / "out.shd"
    sd.save_delta(path, tensors, **options)
    return path.read_bytes()


# --- round trips ---


@given(
    tensors=st.dictionaries(names, deltas(), max_size=4),
    pairs=metadata,
    values=st.sampled_from(VALUES),
    zstd=st.booleans(),
)
def test_any_delta_comes_back_and_the_reference_agrees(tmp_path_factory, tensors, pairs, values, zstd):
    data = written(tensors, tmp_path_factory.mktemp("files"), metadata=pairs, values=values, zstd=zstd)
    with sd.open_delta(data) as delta:
        delta.verify()
        assert by_decoder(data) == contents(delta)
        assert list(delta) == sorted(tensors, key=str.encode)
        assert delta.metadata == pairs
        for name, tensor in tensors.items():
            found = delta[name]
            assert (found.shape, found.dtype, found.op) == (tensor.shape, tensor.dtype, tensor.op)
            assert np.array_equal(found.positions(), tensor.positions())
            if values == "f32" or tensor.op != "add":
                assert found.bits().tobytes() == tensor.bits().tobytes()


@pytest.mark.parametrize("values", VALUES)
def test_reading_and_writing_again_keeps_positions_and_digest(tmp_path, values):
    first = written({"w": random_delta()}, tmp_path, values=values)
    exact = written(sd.open_delta(first), tmp_path, values="f32")
    assert sd.open_delta(exact).digest == sd.open_delta(first).digest


def test_order_of_the_mapping_does_not_matter(tmp_path):
    tensors = {name: random_delta(seed=i) for i, name in enumerate(["b", "a", "é", "Z"])}
    backwards = dict(reversed(tensors.items()))
    assert written(tensors, tmp_path) == written(backwards, tmp_path)


def test_zstd_changes_neither_contents_nor_digest(tmp_path):
    tensor = sd.TensorDelta((100, 100), np.arange(0, 9000, 3), np.random.default_rng(0).integers(0, 4, 3000))
    plain, packed = (written({"w": tensor}, tmp_path, values="f32", zstd=zstd) for zstd in (False, True))
    assert len(packed) < len(plain)
    assert sd.open_delta(packed)["w"].record.values.zstd
    assert sd.open_delta(packed).digest == sd.open_delta(plain).digest
    sd.open_delta(packed).verify()


@pytest.mark.parametrize(
    "tensor",
    [random_delta((4000,), 3), sd.TensorDelta((9000,), None, np.zeros(9000))],
    ids=["makes_nothing_smaller", "passes_the_ratio"],
)
def test_zstd_is_left_out_where_it(tmp_path, tensor):
    assert written({"w": tensor}, tmp_path, zstd=True, values="bf16") == written({"w": tensor}, tmp_path, values="bf16")


@pytest.mark.parametrize("source", ["path", "str", "bytes", "stream"])
def test_every_kind_of_source(source):
    path = VALID / "example.shd"
    with open(path, "rb") as stream:
        opened = {"path": path, "str": str(path), "bytes": path.read_bytes(), "stream": stream}[source]
        with sd.open_delta(opened) as delta:
            assert delta["w"].positions().tolist() == [3, 4, 9]
            assert delta.file == (str(path) if source in ("path", "str") else None)
            assert delta.version == "1.0"
            assert delta.nnz == 3


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        ((1 << 31, 2), [0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]),
        (((1 << 32) - 1,), [(1 << 32) - 3, (1 << 32) - 2]),
        ((1 << 16, 1 << 16), [0, 1 << 31, (1 << 32) - 1]),
        ((128, 1 << 30), [*range(1 << 33, (1 << 33) + 3000, 3), (1 << 37) - 1]),
        ((1 << 28, 1 << 28), [1, 1 << 55, (1 << 56) - 1]),
    ],
    ids=["2^32", "2^32-1", "2^32_square", "2^37", "2^56"],
)
def test_tensors_past_31_and_32_bits(tmp_path, shape, positions):
    data = written({"w": sd.TensorDelta(shape, positions, np.ones(len(positions)))}, tmp_path)
    tensor = sd.open_delta(data)["w"]
    assert tensor.positions().tolist() == positions
    assert by_decoder(data)["tensors"][0]["positions"] == positions
    columns = matrix_shape(shape)[1]
    row = positions[-1] // columns
    assert tensor.rows(row, row + 1)[0].tolist() == [p for p in positions if p // columns == row]


# --- canonical bytes and the digest ---


def test_each_tensor_gets_its_smallest_codec(tmp_path):
    shape = (64, 96)
    tensors = {
        "sparse": random_delta(shape, 60),
        "few": sd.TensorDelta(shape, [7], [1.0]),
        "dense": random_delta(shape, 9000),
        "row": sd.TensorDelta(shape, np.arange(96, 192), np.ones(96)),
        "all": sd.TensorDelta(shape, None, np.ones(64 * 96)),
        "none": sd.TensorDelta(shape, [], []),
    }
    delta = sd.open_delta(written(tensors, tmp_path))
    found = {name: tensor.record.index_codec_name for name, tensor in delta.items()}
    assert found == {
        "sparse": "RICE",
        "few": "RAW",
        "dense": "BITMAP",
        "row": "STRUCT",
        "all": "ALL",
        "none": "NONE",
    }
    for name, tensor in delta.items():
        if name != "none":
            assert tensor.record.index_codec == smallest_section(tensor.positions(), shape)[0]


def test_the_writer_refuses_what_a_reader_would(tmp_path):
    values = np.ones(1, np.float32)
    tensor = sd.TensorDelta.trusted((4,), np.array([1]), values, "float64", "add", None)
    with pytest.raises(DeltaError, match="tensor 'w': ADD of float64 with RAW and F32"):
        written({"w": tensor}, tmp_path, values="f32")
    assert not list(tmp_path.iterdir())


def test_digest_is_about_contents_alone(tmp_path):
    tensor = random_delta(dtype="bfloat16")
    plain = sd.open_delta(written({"w": tensor}, tmp_path, values="f32"))
    base = np.zeros(tensor.nnz, np.uint16)
    known = sd.TensorDelta(tensor.shape, tensor.positions(), tensor.values(), dtype="bfloat16", base_bits=base)
    more = sd.open_delta(written({"w": known}, tmp_path, values="f32", metadata={"k": "v"}, zstd=True))
    assert more["w"].base_fingerprint is not None
    assert plain.digest == more.digest
    assert tensor_digest(plain["w"]) == tensor_digest(tensor)


@pytest.mark.parametrize(
    "other",
    [
        {"w": random_delta(seed=1)},
        {"v": random_delta()},
        {"w": random_delta((96, 64))},
        {"w": random_delta(dtype="float16")},
        {"w": random_delta(), "x": random_delta()},
        {},
    ],
    ids=["values", "name", "shape", "dtype", "more", "nothing"],
)
def test_digest_differs_with_contents(tmp_path, other):
    digest = sd.open_delta(written({"w": random_delta()}, tmp_path)).digest
    assert sd.open_delta(written(other, tmp_path)).digest != digest


def test_fingerprints_are_those_of_base_and_result(tmp_path):
    positions, base = [3, 4, 9], np.array([0x3F80, 0xBF80, 0x7FC0], np.uint16)
    tensor = sd.TensorDelta((16,), positions, [0.5, 1.0, 2.0], dtype="bfloat16", base_bits=base)
    found = sd.open_delta(written({"w": tensor}, tmp_path, values="f32"))["w"]
    after = np.array([0x3FC0, 0x0000, 0x7FC0], np.uint16)
    assert found.base_fingerprint == arithmetic.fingerprint(np.array(positions), base)
    assert found.result_fingerprint == arithmetic.fingerprint(np.array(positions), after)


def test_fingerprint_of_no_positions_is_known_to_be_0(tmp_path):
    nothing = np.zeros(0, np.uint16)
    tensor = sd.TensorDelta((16,), [], nothing, dtype="bfloat16", op="set", base_bits=nothing)
    found = sd.open_delta(written({"w": tensor}, tmp_path))["w"]
    assert (found.base_fingerprint, found.result_fingerprint) == (0, 0)


# --- rows ---

SOME_ROWS = [(0, 64), (0, 1), (63, 64), (10, 30), (5, 5), (0, 0), (64, 64)]


@pytest.mark.parametrize("codec", [codec.id for codec in INDEX_CODECS.values() if not codec.needs_base])
@pytest.mark.parametrize("rows", SOME_ROWS)
def test_rows_are_those_of_the_whole(tmp_path, codec, rows):
    shape = (64, 96)
    elements = np.arange(6144)
    crossed = elements[(elements // 96 % 4 == 0) & (elements % 96 % 4 == 0) & (elements % 5 > 0)]
    drawn = Draw(5, 300)
    tensor = {
        registry.IndexId.RICE: random_delta(shape, 300),
        registry.IndexId.RAW: random_delta(shape, 3),
        registry.IndexId.BITMAP: random_delta(shape, 9000),
        registry.IndexId.STRUCT: sd.TensorDelta(shape, np.arange(12, 6144, 96), np.ones(64)),
        registry.IndexId.ALL: sd.TensorDelta(shape, None, np.arange(6144) - 3000.0),
        registry.IndexId.TILED: sd.TensorDelta(shape, crossed, np.arange(crossed.size) + 1.0),
        registry.IndexId.SEEDED: sd.TensorDelta(shape, drawn.positions(6144)[5:], np.arange(295.0), draw=drawn),
    }[codec]
    found = sd.open_delta(written({"w": tensor}, tmp_path))["w"]
    assert found.record.index_codec == codec
    inside = (found.positions() >= rows[0] * 96) & (found.positions() < rows[1] * 96)
    positions, values = found.rows(*rows)
    assert np.array_equal(positions, found.positions()[inside])
    assert values.tobytes() == found.values()[inside].tobytes()


@pytest.mark.parametrize("rows", [(-1, 3), (3, 2), (0, 65)])
def test_rows_out_of_range(tmp_path, rows):
    tensor = sd.open_delta(written({"w": random_delta()}, tmp_path))["w"]
    with pytest.raises(DeltaError, match="64 rows"):
        tensor.rows(*rows)


def test_rows_do_not_look_at_what_they_do_not_need(tmp_path):
    data = bytearray(written({"w": random_delta((1000, 100), 20000)}, tmp_path, values="bf16"))
    whole = sd.open_delta(bytes(data))["w"]
    expected, record = whole.rows(0, 20), whole.record
    assert record.index_codec == registry.IndexId.RICE
    for section in record.index, record.values:
        data[section.offset + section.stored - 600 : section.offset + section.stored - 100] = b"\xff" * 500
    damaged = sd.open_delta(bytes(data))["w"]
    positions, values = damaged.rows(0, 20)
    assert np.array_equal(positions, expected[0])
    assert np.array_equal(values, expected[1])
    with pytest.raises(FormatError, match="section_checksum"):
        damaged.positions()


# --- laziness ---


class Lazy(Mapping[str, sd.TensorDelta]):
    """Makes each tensor when it is asked for, and counts those alive."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.names = [f"layer.{i}" for i in range(count)]
        self.fails_at = fails_at
        self.alive: weakref.WeakSet[sd.TensorDelta] = weakref.WeakSet()
        self.most_alive = 0

    def __getitem__(self, name: str) -> sd.TensorDelta:
        i = self.names.index(name)
        if i == self.fails_at:
            raise OSError(28, "No space left on device")
        tensor = random_delta((50, 50), 100, i)
        self.alive.add(tensor)
        self.most_alive = max(self.most_alive, len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_tensors_are_taken_one_at_a_time(tmp_path):
    lazy = Lazy(20)
    assert len(sd.open_delta(written(lazy, tmp_path))) == 20
    assert lazy.most_alive <= 2


def test_opening_decodes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.shd"
    sd.save_delta(path, {"w": random_delta()})
    monkeypatch.setattr(type(INDEX_CODECS["RICE"]), "decode", None)
    with sd.open_delta(path) as delta:
        assert delta["w"].nnz > 0
        assert "add 64x96" in repr(delta["w"])


def test_a_closed_delta_says_so(tmp_path):
    delta = sd.open_delta(written({"w": random_delta()}, tmp_path))
    positions = delta["w"].positions()
    delta.close()
    assert positions.size
    for use in delta.verify, delta["w"].positions, delta["w"].values:
        with pytest.raises(ShiraDeltaError, match="closed") as caught:
            use()
        assert not isinstance(caught.value, FormatError)


# --- writing atomically ---


@pytest.fixture
def old(tmp_path):
    """A file that is to be replaced."""
    path = tmp_path / "out.shd"
    sd.save_delta(path, {"old": random_delta()})
    return path


@pytest.mark.slow
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(old):
    before = old.read_bytes()
    with pytest.raises(TargetError, match="No space left"):
        sd.save_delta(old, Lazy(5, fails_at=3))
    assert old.read_bytes() == before
    assert os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file_and_nothing_else(old, step, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    before = old.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(TargetError, match="nothing was changed"):
        sd.save_delta(old, {"new": random_delta()})
    assert old.read_bytes() == before
    assert os.listdir(old.parent) == [old.name]


def test_an_interruption_leaves_nothing(tmp_path):
    class Interrupted(Lazy):
        def __getitem__(self, name):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd.save_delta(tmp_path / "out.shd", Interrupted(2))
    assert os.listdir(tmp_path) == []


def test_a_file_can_be_written_over_while_it_is_read(old):
    with sd.open_delta(old) as delta:
        before = delta["old"].positions().copy()
        sd.save_delta(old, {**delta, "new": random_delta(seed=3)})
        assert np.array_equal(delta["old"].positions(), before)
    assert sorted(sd.open_delta(old)) == ["new", "old"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_the_mode_of_the_old_file_is_kept_and_a_new_one_is_like_any_other(old):
    old.chmod(0o640)
    sd.save_delta(old, {})
    assert old.stat().st_mode & 0o777 == 0o640
    other = old.with_name("new.shd")
    sd.save_delta(other, {})
    (old.parent / "plain").touch()
    assert other.stat().st_mode == (old.parent / "plain").stat().st_mode


# --- errors ---


def refused(function, *arguments, **options) -> str:
    """The one line of the error."""
    with pytest.raises(ShiraDeltaError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def test_missing_file_and_folder(tmp_path):
    assert "missing.shd" in refused(sd.open_delta, tmp_path / "missing.shd")
    assert str(tmp_path) in refused(sd.open_delta, tmp_path)
    assert "nowhere" in refused(sd.save_delta, tmp_path / "nowhere" / "out.shd", {})


def test_an_empty_file_is_no_delta(tmp_path):
    (tmp_path / "empty.shd").touch()
    assert "bad_magic" in refused(sd.open_delta, tmp_path / "empty.shd")
    assert "bad_magic" in refused(sd.open_delta, io.BytesIO())


@pytest.mark.parametrize("name", ["", "a\nb", "n" * 1025, "\ud800", "\x7f"])
def test_names_that_a_file_cannot_hold(tmp_path, name):
    assert "name" in refused(sd.save_delta, tmp_path / "out.shd", {name: random_delta()})


@pytest.mark.parametrize("pairs", [{"": "x"}, {"k": "\ud800"}, {"\udfff": "v"}, {"k": "x" * (16 << 20)}])
def test_metadata_that_a_file_cannot_hold(tmp_path, pairs):
    assert "metadata" in refused(sd.save_delta, tmp_path / "out.shd", {}, pairs)
    assert os.listdir(tmp_path) == []


def test_values_that_do_not_fit_name_the_tensor(tmp_path):
    tensor = sd.TensorDelta((2,), [0], [1e30])
    text = refused(sd.save_delta, tmp_path / "out.shd", {"layers.7.weight": tensor}, values="f16")
    assert "layers.7.weight" in text
    assert "f32" in text


def test_what_threads_encode_is_written_as_one_does(tmp_path):
    tensors = {str(seed): random_delta(count=50 << seed, seed=seed) for seed in range(8)}
    with (tmp_path / "threads.shd").open("wb") as output, writing_to(output) as writer:
        for one in ahead(lambda name: writer.encode(name, tensors[name]), tensors, threads=4):
            writer.add_encoded(one)
        with pytest.raises(ArgumentError, match="'3' is given twice"):
            writer.add_encoded(writer.encode("3", tensors["4"]))
    assert (tmp_path / "threads.shd").read_bytes() == written(tensors, tmp_path)


def test_an_unknown_codec_lists_those_there_are(tmp_path):
    text = refused(sd.save_delta, tmp_path / "out.shd", {}, values="nothing-of-the-kind")
    assert all(name in text for name in VALUES)


def test_a_damaged_section_names_file_tensor_and_place(old):
    data = bytearray(old.read_bytes())
    record = sd.open_delta(old)["old"].record
    data[record.values.offset] ^= 1
    old.write_bytes(data)
    delta = sd.open_delta(old)
    text = refused(delta["old"].values)
    assert str(old) in text
    assert "'old'" in text
    assert f"byte {record.values.offset}" in text


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("share", [0, 0.003, 0.6, 1])
def test_elements_at_the_positions_of_another_file_are_the_bytes_that_a_set_is(share: float, zstd: bool):
    rng = np.random.default_rng(0)
    shape, numel = (300, 500), 150_000
    positions = np.flatnonzero(rng.random(numel) < share)
    other, written = io.BytesIO(), io.BytesIO()
    with writing_to(other, "f32", zstd) as writer:
        writer.add("w", sd.TensorDelta(shape, positions, np.ones(positions.size)))
    old, new = rng.integers(0, 1 << 16, (2, numel), np.uint16)
    with writing_to(written) as writer:
        at = sd.open_delta(other.getvalue())["w"]
        windows = ((part, old[part], new[part]) for part in np.array_split(positions, 3) if part.size)
        writer.add_set("w", at, registry.DTYPE_OF_NAME["bfloat16"], windows)
    wanted = sd.TensorDelta(shape, positions, old[positions], "bfloat16", "set", base_bits=new[positions])
    expected = io.BytesIO()
    with writing_to(expected) as writer:
        writer.add("w", wanted)
    assert written.getvalue() == expected.getvalue()
