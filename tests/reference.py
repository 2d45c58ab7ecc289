"""The spec's own code as modules, its vectors, and one way to ask all readers about a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zstandard

import shiradelta as sd
from shiradelta.backends.choose import choose
from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs import FROM_BASE, INDEX_CODECS, ULP_FROM_BASE, VALUE_CODECS
from tests import building

SPEC = Path(__file__).parent.parent / "spec"
VALID = SPEC / "vectors" / "valid"
INVALID = SPEC / "vectors" / "invalid"
WITH_BASE = SPEC / "vectors" / "with_base"

#: What a reader says about a file: its contents, or the reason code of the refusal.
Outcome = dict[str, Any] | str


def load(name: str) -> ModuleType:
    """A module of `spec/`, which is no package."""
    described = importlib.util.spec_from_file_location(name, SPEC / f"{name}.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    described.loader.exec_module(module)
    return module


decoder = load("decoder")
make_vectors = load("make_vectors")


def unzstd(stored: bytes, size: int) -> bytes:
    """What the reference decoder is given for zstd."""
    if zstandard.frame_content_size(stored) != size:
        raise ValueError("the frame states another size, or none")
    return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)


def without_zstandard() -> AbstractContextManager[object]:
    """In it, zstandard cannot be imported."""
    return mock.patch.dict(sys.modules, {"zstandard": None})


def by_decoder(data: bytes, zstd: bool = True, base: Mapping[str, bytes] | None = None) -> Outcome:
    """What spec/decoder.py says."""
    try:
        return json.loads(json.dumps(asdict(decoder.decode(data, unzstd if zstd else None, base))))
    except decoder.Refused as refused:
        return str(refused.reason)


def by_package(data: bytes, zstd: bool = True, backend: str = "numpy") -> Outcome:
    """What the package says after it has looked at everything."""
    with nullcontext() if zstd else without_zstandard():
        try:
            with sd.open_delta(data, backend=backend) as delta:
                delta.verify()
                return contents(delta)
        except FormatError as error:
            return error.reason


def records_of(data: bytes) -> list[Any]:
    """The records of a file whose table is right."""
    header = decoder.read_header(data)
    offsets, end = decoder.read_file_sections(data, header)
    records: list[Any] = decoder.read_table(data, header, offsets, end)
    return records


def base_of(data: bytes, elements: bytes) -> dict[str, bytes]:
    """The base of a vector, by name: its elements are those of all tensors, one tensor after the other."""
    base, at = {}, 0
    for record in records_of(data):
        size = record.numel * record.element_size
        base[record.tensor.name] = elements[at : at + size]
        at += size
    assert at == len(elements)
    return base


def by_codecs(data: bytes, base: Mapping[str, bytes]) -> Outcome:
    """What NumPy's codecs make of a file's sections beside its base; decoder.py reads the container."""
    with mock.patch.multiple(decoder, decode_positions=_positions_by_codec, decode_values=_values_by_codec):
        return by_decoder(data, base=base)


def _positions_by_codec(record: Any, section: bytes, base: Mapping[str, bytes]) -> list[int]:
    if not record.nnz:
        return []
    codec = INDEX_CODECS[record.tensor.index_codec]
    content, shape = np.frombuffer(section, np.uint8), record.tensor.shape
    with _refusing():
        if codec is FROM_BASE:
            return FROM_BASE.decode_on(content, record.nnz, shape, _elements(record, base)).tolist()
        return codec.decode(content, record.nnz, shape).tolist()


def _values_by_codec(record: Any, section: bytes, base: Mapping[str, bytes]) -> list[int]:
    if not record.nnz:
        return []
    codec = VALUE_CODECS[record.tensor.value_codec]
    content, size = np.frombuffer(section, np.uint8), record.element_size
    with _refusing():
        if codec is ULP_FROM_BASE:
            at = _elements(record, base)[record.tensor.positions]
            return ULP_FROM_BASE.decode_on(content, record.nnz, size, at).tolist()
        codec.check(content, record.nnz, size)
        values = codec.decode(content, record.nnz, size, 0, record.nnz)
        return values.view(f"<u{values.itemsize}").tolist()


def _elements(record: Any, base: Mapping[str, bytes]) -> Array:
    return np.frombuffer(base[record.tensor.name], f"<u{record.element_size}")


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise decoder.Refused(error.reason) from error


def _dumped(files: Sequence[Path], zstd: bool) -> list[str]:
    """A line for each file, and one about the program."""
    return building.run(building.dump(), *([] if zstd else ["--without-zstd"]), *files).splitlines()


@cache
def _corpus_by_libshd(zstd: bool) -> dict[bytes, tuple[str, str]]:
    """What libshd says of all vectors: one process instead of a thousand."""
    files = [*VALID.glob("*.shd"), *INVALID.glob("*.shd")]
    *said, about = _dumped(files, zstd)
    return {path.read_bytes(): (line, about) for path, line in zip(files, said, strict=True)}


def by_libshd(data: bytes, zstd: bool = True) -> Outcome:
    """What libshd says, without the package."""
    if (lines := _corpus_by_libshd(zstd).get(data)) is None:
        path = building.scratch() / "vector.shd"
        path.write_bytes(data)
        lines = tuple(_dumped([path], zstd))
    outcome, about = map(json.loads, lines)
    if zstd and not about["zstd"] and outcome == "zstd_unavailable":
        pytest.skip("libzstd is not installed")
    return outcome if isinstance(outcome, str) else with_names(outcome)


def with_names(outcome: dict[str, Any]) -> dict[str, Any]:
    """Contents with names in place of the registry's ids."""
    for tensor in outcome["tensors"]:
        for key, names in NAMES.items():
            tensor[key] = names[tensor[key]]
    return outcome


NAMES = {
    "dtype": {id: name for name, (id, _) in make_vectors.DTYPES.items()},
    "op": {id: name for name, id in make_vectors.OPS.items()},
    "index_codec": {id: name for name, id in make_vectors.INDEX_CODECS.items()},
    "value_codec": {id: name for name, id in make_vectors.VALUE_CODECS.items()},
}


def contents(delta: Any) -> dict[str, Any]:
    """An open file as `decoder.py` prints it."""
    return {
        "minor": int(delta.version.removeprefix("1.")),
        "digest": delta.digest,
        "metadata": delta.metadata,
        "tensors": [
            {
                "name": name,
                "dtype": tensor.dtype,
                "op": tensor.op.upper(),
                "index_codec": tensor.record.index_codec_name,
                "value_codec": tensor.record.value_codec_name,
                "shape": list(tensor.shape),
                "positions": tensor.positions().tolist(),
                "values": tensor.bits().tolist(),
                "base_fingerprint": tensor.base_fingerprint,
                "result_fingerprint": tensor.result_fingerprint,
            }
            for name, tensor in delta.items()
        ],
    }


def is_available(backend: str) -> bool:
    """Whether the package has it here."""
    try:
        choose(backend)
    except sd.ShiraDeltaError:
        return False
    return True


def knows_base(backend: str) -> bool:
    """Whether the backend has the codecs that need the base."""
    return is_available(backend) and FROM_BASE.id in choose(backend).index_codecs


def names_base_codec(data: bytes) -> bool:
    """Whether the table of a file, as far as it is there, names a codec that needs the base."""
    records = range(128, min(128 + 160 * int.from_bytes(data[12:16], "little"), len(data) - 10), 160)
    return any(data[at + 9] == FROM_BASE.id or data[at + 10] == ULP_FROM_BASE.id for at in records)


#: What reads a file whole, without its base.
READERS = [
    pytest.param(by_decoder, id="decoder"),
    pytest.param(by_package, id="numpy"),
    pytest.param(
        partial(by_package, backend="libshd"),
        id="libshd",
        marks=pytest.mark.skipif(not is_available("libshd"), reason="the package was built without libshd"),
    ),
    pytest.param(by_libshd, id="C", marks=pytest.mark.skipif(building.CC is None, reason="no C compiler")),
]
