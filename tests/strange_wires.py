"""Damages steps of other projects: mostly what they say of themselves, with checksums that fit, so that most go far."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import zstandard

import shiradelta as sd
from shiradelta.chain.wires import WIRES, read_wire, write_wire
from tests.chain.models import change, replayed, set_step, tensor, write
from tests.chain.models import read as model_of
from tests.scenes import contents
from tests.source_files import Raw, Strange, Tree, as_json
from tests.strange_sources import damaged_bytes, damaged_value

Files = dict[str, bytes]


@cache
def written() -> dict[str, tuple[Files, Files]]:
    """Wire -> (the base's files, those of a step on it)."""
    rng, found = np.random.default_rng(0), {}
    before = {"up.weight": tensor(rng, (6, 8)), "norm.weight": tensor(rng, (9,), "float32"), "scale": tensor(rng, ())}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = write(root / "base", before)
        sd.save_delta(root / "step.shd", set_step(before, change(before, rng, 0.4)))
        for wire in WIRES:
            write_wire(wire, root / "step.shd", base, root / wire)
            found[wire] = contents(base), contents(root / wire)
    return found


def with_header(raw: bytes, change_: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack_from("<Q", raw)
    text = as_json(change_(json.loads(raw[8 : 8 + size])))
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def with_spec(raw: bytes, change_: Callable[[Any], Any]) -> bytes:
    """A flush of verl with another spec; the checksum of its blobs stays."""
    (size,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    blobs = {name: data[slice(*one["data_offsets"])] for name, one in header.items() if name != "__metadata__"}
    blobs["__delta_spec__"] = as_json(change_(json.loads(blobs["__delta_spec__"])))
    end = 0
    for name, blob in blobs.items():
        header[name]["data_offsets"] = [end, end := end + len(blob)]
    header["__delta_spec__"]["shape"] = [len(blobs["__delta_spec__"])]
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs.values())


def with_sparse_header(raw: bytes, change_: Callable[[Any], Any]) -> bytes:
    """grail's data with another header."""
    whole = zstandard.ZstdDecompressor().decompress(raw)
    (size,) = struct.unpack_from("<I", whole)
    text = as_json(change_(json.loads(whole[4 : 4 + size])))
    return zstandard.ZstdCompressor().compress(struct.pack("<I", len(text)) + text + whole[4 + size :])


def with_items(raw: bytes, change_: Callable[[Any], Any]) -> bytes:
    """A payload of NeMo-RL with other items."""
    import torch

    stream = io.BytesIO(zstandard.ZstdDecompressor().decompress(raw))
    locations, values, items = torch.load(stream, weights_only=True)
    stream = io.BytesIO()
    torch.save((locations, values, change_(items)), stream)
    return zstandard.ZstdCompressor().compress(stream.getvalue())


def _strange(wire: str, base: Files, files: Files) -> Strange:
    tree: Tree = {f"base/{key}": Raw(data) for key, data in base.items()}
    tree |= {f"source/{key}": Raw(data) for key, data in files.items()}
    return Strange("wire", tree, "source", "base", {"wire": wire})


def whole_wire(wire: str) -> Strange:
    """A step as it should be."""
    return _strange(wire, *written()[wire])


def damaged_wire(rng: Random) -> Strange:
    """A step with a change in one of its files."""
    wire = rng.choice([*WIRES])
    base, files = written()[wire]
    files = dict(files)
    name = rng.choice([name for name in files if files[name]])
    raw, action = files[name], rng.random()

    def changed(value: Any) -> Any:
        return damaged_value(rng, value)

    if action < 0.25:
        raw = damaged_bytes(rng, raw)
    elif name.endswith(".json"):
        raw = as_json(changed(json.loads(raw)))
    elif name.endswith(".safetensors"):
        raw = (with_spec if wire == "verl" and action < 0.8 else with_header)(raw, changed)
    elif name.endswith(".zst"):
        raw = with_sparse_header(raw, changed)
    elif name.endswith(".pt"):
        raw = with_items(raw, changed)
    files[name] = raw
    if wire == "grail" and name == "delta_sparse.bin.zst" and action < 0.9:
        metadata = json.loads(files["metadata.json"])
        metadata["file_manifest"][name] = hashlib.sha256(raw).hexdigest()
        files["metadata.json"] = as_json(metadata)
    if wire == "nemo-rl" and name == "000000.pt" and action < 0.9:
        digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
        files["000000.json"] = as_json({"key": name, "checksum": digest})
    return _strange(wire, base, files)


def read_strange_wire(strange: Strange, root: Path) -> str:
    """Reads a step; what it gives are the base's tensors."""
    out = root / "out.shd"
    read_wire(strange.options["wire"], root / strange.source, root / str(strange.base), out)
    before = model_of(root / str(strange.base))
    after = replayed(before, out)
    assert {name: one[:2] for name, one in after.items()} == {name: one[:2] for name, one in before.items()}
    out.unlink()
    return f"{strange.options['wire']} read"
