"""The conformance corpus: all readers over all of it, and the tables and examples of the spec."""

from __future__ import annotations

import json
import re
import struct
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.backends.choose import FILE_BACKENDS
from shiradelta.errors import REASONS, FormatError
from shiradelta.format import arithmetic
from shiradelta.format import registry as ids
from shiradelta.format.codecs import FROM_BASE, INDEX_CODECS, VALUE_CODECS, VALUE_OPTIONS
from shiradelta.format.delta import matrix_shape
from shiradelta.format.draw import Draw
from shiradelta.format.operations import OPERATIONS
from tests.reference import (
    INVALID,
    READERS,
    SPEC,
    VALID,
    WITH_BASE,
    base_of,
    by_codecs,
    by_decoder,
    by_libshd,
    decoder,
    is_available,
    knows_base,
    make_vectors,
    names_base_codec,
    records_of,
)

FORMAT = (SPEC / "FORMAT.md").read_text(encoding="utf-8")
REGISTRY = (SPEC / "REGISTRY.md").read_text(encoding="utf-8")
REFUSED = json.loads((INVALID / "reasons.json").read_text(encoding="utf-8"))
ACCEPTED = sorted(path.stem for path in VALID.glob("*.shd"))

REFUSED_WITH_BASE = json.loads((WITH_BASE / "reasons.json").read_text(encoding="utf-8"))
BESIDE_BASE = sorted(path.stem for path in WITH_BASE.glob("*.shd"))

readers = pytest.mark.parametrize("read", READERS)
readers_with_base = pytest.mark.parametrize("read", [by_decoder, by_codecs])


def vector(name: str) -> bytes:
    return (VALID / f"{name}.shd").read_bytes()


# --- the corpus ---


def test_corpus_is_what_the_script_makes():
    assert len(ACCEPTED) > 100
    assert len(REFUSED) > 300
    assert len(BESIDE_BASE) - len(REFUSED_WITH_BASE) > 30
    assert len(REFUSED_WITH_BASE) > 100
    assert make_vectors.differences(make_vectors.corpus(), make_vectors.VECTORS) == []


def test_every_reason_is_covered():
    assert {*REFUSED.values(), *REFUSED_WITH_BASE.values()} == set(REASONS)


def test_corpus_is_small():
    assert sum(path.stat().st_size for path in VALID.parent.glob("*/*")) < 1_400_000


@readers
def test_valid_files_hold_what_was_put_in(read):
    right = {name: json.loads((VALID / f"{name}.json").read_text(encoding="utf-8")) for name in ACCEPTED}
    assert [name for name in ACCEPTED if read(vector(name)) != right[name]] == []


@readers
def test_invalid_files_are_refused_for_their_reasons(read):
    found = {
        name: read((INVALID / f"{name}.shd").read_bytes(), zstd=reason != "zstd_unavailable")
        for name, reason in REFUSED.items()
        if is_known((INVALID / f"{name}.shd").read_bytes(), read)
    }
    assert {name: what for name, what in found.items() if what != REFUSED[name]} == {}


def is_known(data: bytes, read) -> bool:
    """Whether a reader knows the codecs of a file; one without those that need the base refuses their ids."""
    by_c = read.keywords.get("backend") == "libshd" if isinstance(read, partial) else read is by_libshd
    return not by_c or knows_base("libshd") or not names_base_codec(data)


@readers_with_base
def test_files_beside_their_base_hold_what_was_put_in_or_are_refused_for_their_reasons(read):
    wrong = {}
    for name in BESIDE_BASE:
        data = (WITH_BASE / f"{name}.shd").read_bytes()
        found = read(data, base=base_of(data, (WITH_BASE / f"{name}.base").read_bytes()))
        right = REFUSED_WITH_BASE.get(name) or json.loads((WITH_BASE / f"{name}.json").read_text(encoding="utf-8"))
        if found != right:
            wrong[name] = found
    assert wrong == {}


@readers
def test_files_without_their_base_need_it(read):
    files = {name: (WITH_BASE / f"{name}.shd").read_bytes() for name in BESIDE_BASE}
    found = {name: read(data) for name, data in files.items() if is_known(data, read)}
    assert {name: what for name, what in found.items() if what != "base_needed"} == {}


@readers
def test_zstd_is_missed_only_where_it_is_needed(read):
    name = next(name for name, reason in REFUSED.items() if reason == "zstd_unavailable")
    assert not isinstance(read((INVALID / f"{name}.shd").read_bytes()), str)
    assert not isinstance(read(vector("zstd_bit_without_use"), zstd=False), str)


@pytest.mark.slow
def test_refusals_are_one_line_that_names_file_and_reason():
    for name, reason in REFUSED.items():
        if reason == "zstd_unavailable":
            continue
        path = INVALID / f"{name}.shd"
        with pytest.raises(FormatError) as caught:
            sd.open_delta(path).verify()
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert str(path) in text
        assert f"[{reason}]" in text


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in FILE_BACKENDS if is_available(name)])
def test_parts_of_an_invalid_file_are_refused_or_consistent(backend):
    """rows() does not look at everything, so it may accept what the whole is refused for; it stays inside."""
    for name in REFUSED:
        if names_base_codec((INVALID / f"{name}.shd").read_bytes()) and not knows_base(backend):
            continue
        try:
            delta = sd.open_delta(INVALID / f"{name}.shd", backend)
        except FormatError:
            continue
        for tensor in delta.values():
            rows, columns = matrix_shape(tensor.shape)
            for start, stop in (0, min(1, rows)), (0, rows // 2), (rows // 2, rows), (0, rows):
                with suppress(FormatError):
                    positions, values = tensor.rows(start, stop)
                    assert positions.size == values.size <= tensor.nnz, name
                    assert np.all((positions >= start * columns) & (positions < stop * columns)), name


def test_same_contents_have_the_same_digest_in_every_encoding():
    def digests(*names):
        return {sd.open_delta(vector(name)).digest for name in names}

    sparse = digests("same_rice", "same_raw", "same_bitmap", "same_struct", "same_bf16")
    dense = digests("same_dense_rice", "same_dense_raw", "same_dense_bitmap")
    assert len(sparse) == len(dense) == 1
    assert sparse != dense


# --- the canonical writer ---

VALUES_NAME = {codec.name: option for option, codec in VALUE_OPTIONS.items()}
CANONICAL = {name: file for name, file in make_vectors.valid_files().items() if file.canonical}


def _listed(tensor) -> np.ndarray:
    """Elements' bits, or shifts."""
    bits = np.array(tensor.values.bits, f"<u{make_vectors.DTYPES[tensor.dtype][1] or 4}")
    return bits.view(f"<i{bits.itemsize}") if tensor.op == "ULP" else bits


def rebuilt(tensor) -> sd.TensorDelta:
    """A tensor of make_vectors.py as the package has it."""
    values, size = tensor.values, make_vectors.DTYPES[tensor.dtype][1]
    return sd.TensorDelta(
        tensor.shape,
        None if tensor.op in ("NEW", "REPLACE") else list(tensor.index.positions),
        np.array(values.source) if tensor.op == "ADD" else _listed(tensor),
        tensor.dtype,
        tensor.op.lower(),
        None if tensor.base is None else np.array(tensor.base, f"<u{size}"),
        draw=None if tensor.index.draw is None else Draw(*tensor.index.draw),
    )


def test_writer_makes_the_canonical_bytes(tmp_path):
    different = []
    for name, file in CANONICAL.items():
        codecs = {VALUES_NAME[t.values.codec] for t in file.tensors if t.values.codec in VALUES_NAME} or {"f32"}
        tensors = {tensor.name: rebuilt(tensor) for tensor in reversed(file.tensors)}
        sd.save_delta(tmp_path / f"{name}.shd", tensors, file.metadata, values=codecs.pop())
        if (tmp_path / f"{name}.shd").read_bytes() != vector(name):
            different.append(name)
    assert len(CANONICAL) > 50
    assert different == []


def test_every_codec_is_among_the_canonical_vectors():
    tensors = [tensor for file in CANONICAL.values() for tensor in file.tensors]
    free = {*make_vectors.FROM_BASE_CODECS}  # the writer's choice is not told
    assert {tensor.index.codec for tensor in tensors} == set(make_vectors.INDEX_CODECS) - free
    assert {tensor.values.codec for tensor in tensors} == set(make_vectors.VALUE_CODECS) - free


# --- REGISTRY.md and the tables of FORMAT.md ---


def tables(text: str) -> list[list[list[str]]]:
    """All Markdown tables: rows of cells, without the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in b.splitlines()[2:]] for b in blocks]


def registry(heading: str) -> list[list[str]]:
    """The table below a heading of REGISTRY.md."""
    return tables(REGISTRY.split(f"## {heading}\n")[1])[0]


def test_registry_dtypes():
    rows = [[str(d.id), d.name, d.safetensors, str(d.size or "-")] for d in ids.DTYPES]
    assert registry("dtypes") == rows


@pytest.mark.parametrize(
    ("heading", "kind", "members", "nothing"),
    [
        ("ops", ids.Op, OPERATIONS, {}),
        ("index codecs", ids.IndexId, INDEX_CODECS, {0: "NONE"}),
        ("value codecs", ids.ValueId, VALUE_CODECS, {0: "NONE"}),
    ],
)
def test_registry_ids(heading, kind, members, nothing):
    """The page, the enumeration of all ids, and the rows of those that are not reserved, agree."""
    rows = registry(heading)
    assert [(int(id), name) for id, name, _ in rows] == [(member.value, member.name) for member in kind]
    defined = {int(id): (name, status) for id, name, status in rows if not status.startswith("reserved")}
    named = {id: (row.name.upper(), f"1.{row.minor}") for id, row in members.by_id.items()}
    assert named | {id: (name, "1.0") for id, name in nothing.items()} == defined


def test_the_title_is_the_newest_version():
    rows = [*OPERATIONS.values(), *INDEX_CODECS.values(), *VALUE_CODECS.values()]
    newest = f"version 1.{max(row.minor for row in rows)}"
    assert FORMAT.splitlines()[0].endswith(newest)
    assert REGISTRY.splitlines()[0].endswith(newest)
    assert f"- **{newest.removeprefix('version ')}** " in FORMAT.split("## 12. ")[1]


NEVER = "reserved: never assigned"


@pytest.mark.parametrize("what", ["dtype", "op", "index_codec", "value_codec"])
def test_the_unknown_ids_of_vectors_are_never_assigned(what):
    """A vector that holds for every version has such an id; one of an id set aside for what comes is named after it."""
    if what == "dtype":
        never = {int(id) for id in re.findall(r"\d+", re.findall(r"^The dtypes (.*) are never", REGISTRY, re.M)[0])}
        aside = set()
        assert not never & set(ids.DTYPE_OF_ID)
    else:
        rows = registry(what.replace("_", " ") + "s")
        never = {int(id) for id, _, status in rows if status == NEVER}
        aside = {int(id) for id, _, status in rows if status.startswith("reserved")} - never
    at = {"dtype": 7, "op": 8, "index_codec": 9, "value_codec": 10}[what]
    known = {
        "dtype": set(ids.DTYPE_OF_ID),
        "op": set(OPERATIONS.by_id),
        "index_codec": {0, *INDEX_CODECS.by_id},
        "value_codec": {0, *VALUE_CODECS.by_id},
    }[what]
    used = set()
    for name in (name for name, reason in REFUSED.items() if reason == f"unknown_{what}"):
        data = (INVALID / f"{name}.shd").read_bytes()
        table = [data[ids.HEADER_SIZE + ids.RECORD_SIZE * i :] for i in range(int.from_bytes(data[12:16], "little"))]
        unknown = {record[at] for record in table} - known
        assert unknown
        assert unknown <= never or [f"{what}_{id}" for id in unknown] == [name]
        used |= unknown
    assert used == never | aside


def test_registry_feature_bits():
    bits = [("incompatible", str(bit.bit_length() - 1), bit.name) for bit in ids.Incompatible]
    assert [tuple(row[:3]) for row in registry("feature bits")] == bits


def test_registry_limits():
    limits = {name: value for name, value in vars(ids).items() if name.startswith("MAX_")}
    assert {name: int(value) for name, value, _ in registry("limits")} == limits


def test_registry_reason_codes():
    assert [tuple(row) for row in registry("reason codes")] == list(REASONS.items())


TYPES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "8 x u64": "8Q"}


@pytest.mark.parametrize(("number", "layout", "behind"), [(0, ids.HEADER, "I"), (1, ids.RECORD, "")])
def test_layout_is_that_of_format_md(number, layout, behind):
    rows = [table for table in tables(FORMAT) if table[0][0] == "0" and len(table[0]) == 3][number]
    codes = [TYPES.get(kind) or kind.replace(" bytes", "x" if field == "zero" else "s") for _, kind, field in rows]
    sizes = [struct.calcsize(f"<{code}") for code in codes]
    assert [int(offset) for offset, _, _ in rows] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert "<" + "".join(codes) == layout.format + behind


# --- worked examples (FORMAT.md, section 9) ---


def section(number: str) -> str:
    """The text of a section of FORMAT.md."""
    return re.split(r"^#+ ", FORMAT.split(f"\n### {number} ")[1], maxsplit=1, flags=re.M)[0]


def dump(number: str) -> bytes:
    """The bytes of a section's hex dump."""
    return bytes.fromhex("".join(re.findall(r"^    ((?:[0-9A-F]{2} )+)", section(number), re.M)))


def numbers(row: list[str]) -> list[int]:
    return [int(cell, 0) for cell in row]


def test_rice_example():
    assert INDEX_CODECS["RICE"].encode(np.array([3, 4, 9]), (16,)) == dump("9.1")
    record = sd.open_delta(vector("example"))["w"].record
    assert vector("example")[record.index.offset :][: record.index.stored] == dump("9.1")


def test_i4_example():
    assert VALUE_CODECS["I4"].encode(np.array([0.5, -1.0, 2.25], np.float32)) == dump("9.2")
    record = sd.open_delta(vector("example"))["w"].record
    assert vector("example")[record.values.offset :][: record.values.stored] == dump("9.2")


def test_tiled_example():
    record = sd.open_delta(vector("tiled"))["w"].record
    assert vector("tiled")[record.index.offset :][: record.index.stored] == dump("9.5")
    found = INDEX_CODECS["TILED"].decode(np.frombuffer(dump("9.5"), np.uint8), 6, (4, 4))
    assert found.tolist() == [0, 1, 3, 6, 9, 15]


def test_seeded_example():
    record = sd.open_delta(vector("seeded"))["w"].record
    assert vector("seeded")[record.index.offset :][: record.index.stored] == dump("9.7")
    found = INDEX_CODECS["SEEDED"].decode(np.frombuffer(dump("9.7"), np.uint8), 3, (4, 4))
    assert found.tolist() == [0, 5, 10]
    halves = re.findall(r"\b[0-9A-F]{8}\b", section("9.7"))
    assert [f"{decoder.mix(cell, 7) >> 32:08X}" for cell in range(5)] == halves


def test_from_base_example():
    data, base = ((WITH_BASE / f"from_base.{kind}").read_bytes() for kind in ("shd", "base"))
    (record,) = records_of(data)
    assert data[record.index.offset :][: record.index.stored] == dump("9.6")
    elements = np.frombuffer(base, "<u2")
    assert re.findall(r"\b[0-9A-F]{4}\b", section("9.6").split(". With")[0]) == [f"{bits:04X}" for bits in elements]
    found = FROM_BASE.decode_on(np.frombuffer(dump("9.6"), np.uint8), 7, (4, 4), elements)
    assert found.tolist() == [1, 3, 4, 8, 11, 13, 15]


def test_the_whole_example_file_is_as_printed():
    rows = re.findall(r"^    +(\d+): ((?:[0-9A-F]{2} )*[0-9A-F]{2})", section("9.4"), re.M)
    printed = bytearray(512)
    for offset, row in rows:
        printed[int(offset) : int(offset) + 16] = bytes.fromhex(row)
    assert bytes(printed) == vector("example")


@pytest.mark.parametrize("row", tables(section("9.3"))[0])
def test_fingerprint_example(row):
    position, bits, expected = numbers(row)
    assert arithmetic.fingerprint(np.array([position]), np.array([bits], np.uint64)) == expected
    assert decoder.fingerprint([(position, bits)]) == expected
    assert make_vectors.fingerprint(iter([(position, bits)])) == expected


def test_fingerprint_of_several_elements():
    expected = int(re.findall(r"have the fingerprint\s+(0x[0-9A-F]+)", section("9.3"))[0], 0)
    positions, bits = np.array([3, 4, 9]), np.array([0x3F80, 0xBF80, 0x7FC0], np.uint16)
    assert arithmetic.fingerprint(positions, bits) == expected
    assert sd.open_delta(vector("example"))["w"].base_fingerprint == expected
    assert arithmetic.fingerprint(positions[:0], bits[:0]) == 0
