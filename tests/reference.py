"""The spec's own code as modules, its vectors, and one way to ask both readers about a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import zstandard

import shiradelta as sd
from shiradelta.errors import FormatError

SPEC = Path(__file__).parent.parent / "spec"
VALID = SPEC / "vectors" / "valid"
INVALID = SPEC / "vectors" / "invalid"

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


def by_decoder(data: bytes, zstd: bool = True) -> Outcome:
    """What spec/decoder.py says."""
    try:
        return json.loads(json.dumps(asdict(decoder.decode(data, unzstd if zstd else None))))
    except decoder.Refused as refused:
        return str(refused.reason)


def by_package(data: bytes, zstd: bool = True) -> Outcome:
    """What the package says after it has looked at everything."""
    with nullcontext() if zstd else without_zstandard():
        try:
            with sd.open_delta(data) as delta:
                delta.verify()
                return contents(delta)
        except FormatError as error:
            return error.reason


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
                "index_codec": tensor.record.index_codec.name,
                "value_codec": tensor.record.value_codec.name,
                "shape": list(tensor.shape),
                "positions": tensor.positions().tolist(),
                "values": tensor.bits().tolist(),
                "base_fingerprint": tensor.base_fingerprint,
                "result_fingerprint": tensor.result_fingerprint,
            }
            for name, tensor in delta.items()
        ],
    }


READERS = {"package": by_package, "decoder": by_decoder}
