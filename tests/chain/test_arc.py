"""arc_v3: its forms come back, pickles of more than plain data are refused, and the package itself agrees."""

from __future__ import annotations

import bz2
import os
import pickle
import random
import zlib
from collections import OrderedDict
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.chain.wires import read_wire, write_wire
from shiradelta.chain.wires.arc import decoded
from shiradelta.chain.wires.fireworks import FORMATS
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.safetensors import Slot
from shiradelta.util.plain_pickle import read_plain, write_plain
from tests.chain.models import Array, Model, replayed, same, set_step, tensor, write
from tests.chain.test_every_wire import STEPS
from tests.pairs import pairs


def steps(rng: np.random.Generator) -> tuple[Model, Model]:
    """Elements that move by a unit or two, few that change their exponents, in wide and in tall tensors."""
    before = {
        "wide": tensor(rng, (6, 700)),
        "tall": tensor(rng, (400, 3), "float16"),
        "long": tensor(rng, (3000,), "float32"),
        "dense": tensor(rng, (40, 50)),
        "same": tensor(rng, (4, 4)),
    }
    after = {name: (dtype, shape, bits.copy()) for name, (dtype, shape, bits) in before.items()}
    for name, share in {"wide": 0.2, "tall": 0.3, "long": 0.01, "dense": 1.0}.items():
        bits = after[name][2]
        at = np.flatnonzero(rng.random(bits.size) < share)
        moves = rng.choice([1, -1, 2, 9], at.size, p=[0.6, 0.37, 0.02, 0.01])
        bits[at] = (bits[at].astype(np.int64) + moves).astype(bits.dtype)
    return before, after


@pytest.mark.parametrize("seed", range(3))
def test_every_form_comes_back(tmp_path: Path, seed: int):
    before, after = steps(np.random.default_rng(seed))
    base, step = write(tmp_path / "base", before), tmp_path / "step.shd"
    sd.save_delta(step, set_step(before, after))
    for format in FORMATS:
        write_wire("fireworks", step, base, tmp_path / format, format=format)
        read_wire("fireworks", tmp_path / format, base, tmp_path / "again.shd")
        assert same(replayed(before, tmp_path / "again.shd"), after)


def gaps(positions: Array, kind: str = "uint16") -> dict[str, Any]:
    return {"count": positions.size, "dtype": kind, "data": np.diff(positions, prepend=0).astype(kind).tobytes()}


def as_codes(values: Array) -> dict[str, Any]:
    """Three bits for each mantissa: seven of them are in the book, the others are listed."""
    book = np.array([1, 0, 2, 3, 4, 5, 6], "u1")
    codes = [book.tolist().index(value) if value in book else 7 for value in values.tolist()]
    bits = [code >> place & 1 for code in codes for place in range(3)]
    others = np.flatnonzero(np.array(codes) == 7)
    return {
        "kind": "codebook3",
        "count": values.size,
        "codebook": book.tobytes(),
        "codes": np.packbits(bits, bitorder="little").tobytes(),
        "exception_positions": gaps(others),
        "exception_values": values[others].astype("u1").tobytes(),
    }


def as_rows(at: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    rows = [at[at // shape[1] == row] % shape[1] for row in range(shape[0])]
    counts = np.array([row.size for row in rows], "<u2").tobytes()
    data = b"".join(b"\x02" + np.diff(row, prepend=0).astype("<u2").tobytes() for row in rows if row.size)
    about = {"kind": "row", "shape": shape, "n_rows": shape[0], "row_width": shape[1], "count_dtype": "uint16"}
    return {**about, "data": counts + data}


@pairs(transform=["raw", "xor", "zigzag"], codes=[False, True], rows=[False, True], codec=["zstd", "bz2"])
def test_every_form_that_the_package_knows_is_read(tmp_path: Path, transform: str, codes: bool, rows: bool, codec: str):
    before, after = steps(np.random.default_rng(0))
    dtype, shape, old = before["wide"]
    new = after["wide"][2]
    at = np.flatnonzero(old != new)
    was, now = old[at].astype(int), new[at].astype(int)
    same_exponent = was >> 7 == now >> 7
    moved = (now & 127) - (was & 127)
    stored = {"raw": now & 127, "xor": was ^ now, "zigzag": moved << 1 ^ moved >> 63}[transform]
    stored[~same_exponent] = 0
    others = np.flatnonzero(~same_exponent)
    payload = {
        "version": 1,
        "strategy": "mantissa_xor",
        "shape": shape,
        "dtype": "torch.bfloat16",
        "checksum": str(zlib.adler32(new.tobytes())),
        "mantissa_bits": 7,
        "total_bits": 16,
        "transform": transform,
        "mantissa_stream": as_codes(stored)
        if codes
        else {"kind": "raw", "dtype": "uint8", "data": stored.astype("u1").tobytes()},
        "exception_positions": gaps(others),
        "exception_dtype": "uint16",
        "exception_values": new[at[others]].tobytes(),
        "indices": as_rows(at, shape) if rows else {**gaps(at), "kind": "flat"},
    }

    def made(payload: dict[str, Any]) -> Array:
        raw = pickle.dumps(payload, 5)
        packed = bz2.compress(raw) if codec == "bz2" else zstandard.ZstdCompressor().compress(raw)
        envelope = b"ARC3_ENVELOPE\0" + pickle.dumps({"codec": codec, "data": packed}, 5)
        slot = Slot("wide", Path("x"), 0, shape, DTYPE_OF_NAME[dtype])
        return decoded("x", envelope, slot, old, str(zlib.adler32(new.tobytes())))

    assert np.array_equal(made(payload), new)
    for key in payload:
        for damaged in (without(payload, key), {**payload, key: 77}):
            with pytest.raises(sd.SourceError, match="; "):
                made(damaged)


def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.skipif(find_spec("fireworks_delta_compression") is None, reason="fireworks-delta-compression is missing")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("kind", [*STEPS, "units"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_package_itself_reads_and_writes_the_same(tmp_path: Path, kind: str, format: str):
    import torch
    from fireworks_delta_compression import compression

    before, after = (STEPS.get(kind) or steps)(np.random.default_rng(0))
    base, end = write(tmp_path / "base", before), write(tmp_path / "after", after)
    step = tmp_path / "step.shd"
    sd.save_delta(step, set_step(before, after))
    write_wire("fireworks", step, base, tmp_path / "ours", format=format)
    (tmp_path / "theirs").mkdir()
    files = [folder / "model.safetensors" for folder in (base, end, tmp_path / "theirs")]
    compression.delta_compress_files_to_file(
        src=str(files[0]), dst=str(files[1]), diff_file=str(files[2]), compression_format=format
    )
    read_wire("fireworks", tmp_path / "theirs", base, tmp_path / "again.shd")
    assert same(replayed(before, tmp_path / "again.shd"), after)
    diff = tmp_path / "ours" / "model.safetensors"
    made = compression.decompress_delta_into_source(str(diff), str(files[0]), format)
    for name, (_, _, bits) in after.items():
        found = made[name].reshape(-1)
        assert not bits.size or np.array_equal(found.view(torch.uint8).numpy(), bits.view("u1"))


PLAIN: Any = {
    "version": 1,
    "shape": (2, 3, 4, 5),
    "dtype": "torch.bfloat16",
    "data": b"x" * 70_000,
    "short": b"",
    "deep": {"count": 70_000, "few": (1,), "two": (1, 2), "none": (), "three": (1, -2, 3), "large": 1 << 60},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_data_are_read_as_pickle_reads_them(protocol: int):
    text_only = {key: value for key, value in PLAIN.items() if not isinstance(value, bytes)}
    for value in (text_only if protocol < 3 else PLAIN, {"a": [1, [2], None, "b", "b"]}, 7, "x"):
        assert read_plain(pickle.dumps(value, protocol)) == value
    assert pickle.loads(write_plain(PLAIN)) == PLAIN == read_plain(write_plain(PLAIN))


class Program:
    """What a hostile pickle would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getpid, ()


@pytest.mark.parametrize(
    "raw",
    [
        *(pickle.dumps(value, protocol) for value in (Program(), OrderedDict(a=1), {1: 2}, 1.5) for protocol in (2, 5)),
        b"",
        b"(",
        b"]",
        b".",
        b"\x80\x04K\x01K\x02.",
        b"\x80\x04K\x01.x",
        b"\x80\x04}K\x01a.",
        b"\x80\x04\x85.",
        b"\x80\x04h\x07.",
        b"\x80\x04}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"K\x01" * 200_000,
    ],
)
def test_other_pickles_are_refused(raw: bytes):
    with pytest.raises(ValueError, match=r"^\w"):
        read_plain(raw)


@given(st.randoms(use_true_random=False))
def test_a_damaged_pickle_gives_plain_data_or_is_refused(rng: random.Random):
    raw = bytearray(pickle.dumps(PLAIN, 5))
    for _ in range(rng.randint(1, 5)):
        raw[rng.choice([rng.randrange(200), rng.randrange(len(raw))])] = rng.randrange(256)
    with suppress(ValueError):
        read_plain(bytes(raw))
