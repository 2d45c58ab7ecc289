"""slime's folders on a shared disk, which miles, SkyRL and stitch write and read, too.

A folder looks like a sharded checkpoint: `model-NNNNN-of-NNNNN.safetensors` and `model.safetensors.index.json`.  Each
tensor that changes is a one-dimensional uint8 tensor under its name: the difference of all its bytes, compressed by
zstd.  With `xor` that is old ^ new; with `overwrite` the number of changed bytes, their positions and the new bytes,
positions and number in four bytes each.  The metadata of a file have the checksum of all the new bytes of each tensor.
Read in slime's slime/backends/megatron_utils/update_weight/update_weight_from_disk_delta.py and
slime/utils/disk_delta.py, November 2026.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.chain.wires.checks import Change, described, unzipped
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.checkpoint import Checkpoint, bits_of, shards_of
from shiradelta.models.safetensors import Slot, Unwritten, read_shard, write_tensors
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors
from shiradelta.util.json_files import read_json
from shiradelta.util.optional import importing
from shiradelta.util.registry import Registry

_INDEX = "model.safetensors.index.json"
_FILE = "model-00000-of-00001.safetensors"
_LEVEL = 1


@dataclass(frozen=True)
class Checksum:
    """A checksum of a tensor's bytes.

    Attributes:
        name: what the index calls it.
        of: bytes -> hexadecimal digits.
    """

    name: str
    of: Callable[[Array], str]


@dataclass(frozen=True)
class Difference:
    """How the bytes of a tensor before and after a step are one difference.

    Attributes:
        name: what the index calls it.
        encode: (old, new) -> the difference.
        decode: (old, difference) -> new.
        most: bytes of a tensor -> bytes that its difference has at most.
    """

    name: str
    encode: Callable[[Array, Array], Array]
    decode: Callable[[Array, Array], Array]
    most: Callable[[int], int]


def _adler32(data: Array) -> str:
    return f"{zlib.adler32(data.data):08x}"


def _xxh3(data: Array) -> str:
    with importing("a checksum of xxh3-128"):
        xxhash = import_module("xxhash")
    return str(xxhash.xxh3_128(data.data).hexdigest())


def _blake3(data: Array) -> str:
    with importing("a checksum of blake3"):
        blake3 = import_module("blake3")
    return str(blake3.blake3(data.data).hexdigest())


CHECKSUMS = Registry(
    "checksum", (Checksum("adler32", _adler32), Checksum("xxh3-128", _xxh3), Checksum("blake3", _blake3))
)


def _to_xor(old: Array, new: Array) -> Array:
    difference: Array = old ^ new
    return difference


def _from_xor(old: Array, difference: Array) -> Array:
    if difference.size != old.size:
        raise ValueError(f"has {difference.size:,} bytes for {old.size:,}")
    return _to_xor(old, difference)


def _to_overwrite(old: Array, new: Array) -> Array:
    at = different(old, new)
    if old.size > 1 << 32:
        raise SourceError("a tensor of more than 4 GiB has positions that overwrite cannot hold; take xor")
    head = np.frombuffer(struct.pack("<I", at.size), np.uint8)
    return np.concatenate((head, at.astype("<u4").view(np.uint8), new[at]))


def _from_overwrite(old: Array, difference: Array) -> Array:
    if difference.size < 4:
        raise ValueError("has no number of bytes")
    count = int(difference[:4].view("<u4")[0])
    if difference.size != 4 + 5 * count:
        raise ValueError(f"says {count:,} bytes and has {difference.size:,}")
    at = difference[4 : 4 + 4 * count].copy().view("<u4").astype(np.int64)
    if count and (np.any(at[1:] <= at[:-1]) or at[-1] >= old.size):
        raise ValueError("has positions out of order or range")
    new = old.copy()
    new[at] = difference[4 + 4 * count :]
    return new


ENCODINGS = Registry(
    "difference",
    (
        Difference("xor", _to_xor, _from_xor, lambda size: size),
        Difference("overwrite", _to_overwrite, _from_overwrite, lambda size: 4 + 5 * size),
    ),
)


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder; each is compared with its checksum."""
    about = read_json(folder / _INDEX)
    metadata = about.get("metadata") if isinstance(about, dict) else None
    if not isinstance(metadata, dict) or not isinstance(about.get("weight_map"), dict):
        raise SourceError(f"{folder / _INDEX}: has no metadata of a step; give a folder weight_vNNNNNN")
    if metadata.get("compression_format") != "zstd":
        found = str(metadata.get("compression_format"))[:40]
        raise SourceError(f"{folder / _INDEX}: compression {found!r} is unknown; zstd is known")
    with described(str(folder / _INDEX)):
        encoding = ENCODINGS.find(metadata.get("delta_encoding"))
        checksum = CHECKSUMS.find(metadata.get("checksum_format"))
    seen: set[str] = set()
    for file in shards_of(folder / _INDEX) if about["weight_map"] else []:
        shard = read_shard(folder / file)
        for slot in shard.slots:
            where = f"{shard.file}: tensor {slot.name!r}"
            if about["weight_map"].get(slot.name) != file or slot.name in seen:
                raise SourceError(f"{where} is not the one that the index lists; get the folder again")
            seen.add(slot.name)
            if slot.name not in base:
                raise SourceError(f"{where} is not in {base.root}; give the model before the step")
            old = base.bits(slot.name)
            yield slot.name, old, _decoded(where, slot, old, encoding, checksum, shard.metadata.get(slot.name))
    missing = sorted(set(about["weight_map"]) - seen)
    if missing:
        raise SourceError(
            f"{folder}: tensor {missing[0]!r} is listed in the index, and in no file; get the folder again"
        )


def _decoded(where: str, slot: Slot, old: Array, encoding: Difference, checksum: Checksum, wanted: str | None) -> Array:
    """All bits of a tensor after the step."""
    if slot.dtype.name != "uint8" or len(slot.shape) != 1:
        raise SourceError(f"{where} is {slot.dtype.name} {list(slot.shape)}, not a row of bytes; get the folder again")
    before = old.view(np.uint8)
    raw = unzipped(where, bits_of(slot).tobytes(), encoding.most(before.size))
    try:
        after = encoding.decode(before, np.frombuffer(raw, np.uint8))
    except ValueError as error:
        raise SourceError(f"{where} {error}; get the folder again, or give the model before the step") from None
    if checksum.of(after) != wanted:
        raise SourceError(f"{where} does not give the bytes of its checksum; give the model before the step")
    return after.view(old.dtype)


def _write(
    folder: Path,
    base: Checkpoint,
    changes: Iterable[Change],
    encoding: str,
    checksum: str,
    version: str,
    base_version: str,
) -> None:
    """Writes one shard and its index."""
    with importing("a step of slime"):
        import zstandard
    row, sums = ENCODINGS.find(encoding), CHECKSUMS.find(checksum)
    tensors: list[Unwritten] = []
    digests: dict[str, str] = {}
    for name, old, new in changes:
        if np.array_equal(old, new):
            continue
        after = new.view(np.uint8)
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(row.encode(old.view(np.uint8), after).data)
        data = np.frombuffer(packed, np.uint8)
        tensors.append(Unwritten(name, (data.size,), DTYPE_OF_NAME["uint8"], lambda data=data: data))  # type: ignore[misc]
        digests[name] = sums.of(after)
    metadata: dict[str, Any] = {
        "version": f"{int(version):06d}",
        "base_version": f"{int(base_version):06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    index = {"metadata": metadata, "weight_map": dict.fromkeys(digests, _FILE)}
    with os_errors(folder):
        if tensors:
            with open(folder / _FILE, "w+b") as stream:
                write_tensors(stream, tensors, digests)
        (folder / _INDEX).write_text(json.dumps(index))


WIRES.add(
    Wire(
        "slime",
        "slime's folders on a shared disk, weight_vNNNNNN, which miles, SkyRL and stitch use, too",
        _read,
        _write,
        {"encoding": "xor", "checksum": "adler32", "version": "1", "base_version": "0"},
    )
)
