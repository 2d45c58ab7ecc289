"""grail's delta checkpoints, as the PULSE paper has them: rows and columns of the elements that change, by zstd.

A folder has `delta_sparse.bin.zst`, `delta_metadata.json`, which names the format of it, and `metadata.json`, which has
the SHA-256 of both.  Under zstd are the size of a JSON header, in four bytes, the header, and for each tensor rows,
columns and elements.  Tensors are seen as matrices of their first dimension.  Rows are gaps; columns are gaps within a
row, and begin anew with each row.  v3.1 has rows in one or two bytes and columns in two where those do, v3 has four
everywhere, and v2 has gaps between flat positions.  `metadata.json` may have the xxh3-128 of all bytes of the model
after the step, by name.  The signature of the trainer's wallet, `manifest.sig`, is neither checked nor written.
Read in one-covenant/grail, April 2026: grail/infrastructure/sparse_codec.py, delta_checkpoint.py and
checkpoint_consumer.py, grail/trainer/checkpoint_publisher.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.chain.wires.checks import (
    Change,
    Digest,
    assigned,
    described,
    inside,
    number,
    part,
    positions_of_gaps,
    read_bytes,
    sequence,
    target,
    text,
    unzipped,
    verified,
    viewed,
)
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors
from shiradelta.util.json_files import read_json
from shiradelta.util.optional import importing
from shiradelta.util.registry import Registry

_DATA, _ABOUT, _METADATA, _MARK = "delta_sparse.bin.zst", "delta_metadata.json", "metadata.json", "DELTA"
_LEVEL = 1
_VALUES = ("bfloat16", "float16", "float32")
#: Dtypes of gaps, by their names in a header.
_DTYPES = {"uint8": "u1", "uint16": "<u2", "int32": "<i4"}
_FOUR = "int32"
#: Bytes of a step that are neither positions nor elements: for all of it, and for each tensor.
_AROUND, _EACH = 1 << 20, 4096
_MOST = 1 << 31
_NO_CHECKSUM, _XXH3 = "none", "xxh3-128"


@dataclass(frozen=True)
class SparseFormat:
    """A format of `delta_sparse.bin.zst`.

    Attributes:
        name: what delta_metadata.json calls it.
        version: what its header says.
        flat: whether positions are flat, not rows and columns.
        narrow: whether the header says how many bytes rows and columns take.
    """

    name: str
    version: int
    flat: bool
    narrow: bool


FORMATS = Registry(
    "format",
    (
        SparseFormat("sparse_codec_v3.1", 31, False, True),
        SparseFormat("sparse_codec_v3", 3, False, False),
        SparseFormat("sparse_codec_v2", 2, True, False),
    ),
)


def _xxh3() -> Digest:
    with importing("a checksum of xxh3-128"):
        xxhash = import_module("xxhash")
    found: Digest = xxhash.xxh3_128()
    return found


def _columns(shape: tuple[int, ...]) -> int:
    """Elements of a row."""
    return max(1, math.prod(shape[1:]))


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder, whose files are compared with their digests."""
    metadata, about = read_json(folder / _METADATA), read_json(folder / _ABOUT)
    with described(str(folder / _METADATA)):
        if metadata["checkpoint_type"] != _MARK:
            raise ValueError(f"it is of type {str(metadata['checkpoint_type'])[:40]!r}; {_MARK} is known")
        digests = dict(metadata["file_manifest"])
        if missing := {_DATA, _ABOUT} - set(digests):
            raise ValueError(f"it lists no {min(missing)}")
        for name, digest in digests.items():
            if hashlib.sha256(read_bytes(inside(folder, name))).hexdigest() != digest:
                raise ValueError(f"{name} has another SHA-256")
        wanted = text(metadata.get("weights_hash") or "")
    with described(str(folder / _ABOUT)):
        row = FORMATS.find(about["format"])
    most = _AROUND + sum(_EACH + slot.numel * (8 + slot.dtype.size) for slot in base.values())
    where = str(folder / _DATA)
    changes = _decoded(where, unzipped(where, read_bytes(folder / _DATA), most), base, row)
    yield from verified(where, base, changes, _xxh3(), wanted) if wanted else changes


def _decoded(where: str, raw: bytes, base: Checkpoint, row: SparseFormat) -> Iterator[Change]:
    """The changes of what zstd holds, by name."""
    with described(where):
        size = struct.unpack_from("<I", raw)[0] if len(raw) >= 4 else len(raw)
        header = json.loads(part(np.frombuffer(raw, np.uint8), 4, 4 + size).tobytes().decode())
        if header["version"] != row.version:
            raise ValueError(f"its header is of version {str(header['version'])[:40]}, not {row.version}")
        data, end, found = np.frombuffer(raw, np.uint8, offset=4 + size), 0, []
        for one in sequence(header["tensors"]):
            found.append(_tensor(one, data, end, row))
            end = found[-1][-1]
        if end != data.size:
            raise ValueError(f"it has {data.size:,} bytes for {end:,}")
        if len({name for name, *_ in found}) < len(found):
            raise ValueError("a tensor is in it twice")
    for name, dtype, shape, positions, stored, _ in sorted(found, key=lambda one: one[0]):
        called = f"{where}: tensor {name!r}"
        target(called, name, base, dtype, shape)
        old = base.bits(name)
        with described(called):
            values = viewed(stored, old.dtype.str)
        yield name, old, assigned(called, old, positions, values)


def _tensor(
    one: Any, data: Array, start: int, row: SparseFormat
) -> tuple[str, str, tuple[int, ...], Array, Array, int]:
    """(name, dtype, shape, positions, bytes of the elements, where the next tensor begins).

    Raises:
        LookupError, TypeError, ValueError: what it says is damaged.
    """
    name, dtype, shape = text(one["name"]), text(one["value_dtype"]), tuple(map(number, sequence(one["shape"])))
    if dtype not in _VALUES:
        raise ValueError(f"tensor {name!r} has elements of dtype {dtype[:40]!r}; {', '.join(_VALUES)} are known")
    middle, end = start + number(one["indices_size"]), start + number(one["indices_size"]) + number(one["values_size"])
    if (one["indices_offset"], one["values_offset"]) != (start, middle):
        raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
    stored, values = part(data, start, middle), part(data, middle, end)
    if row.flat:
        positions = positions_of_gaps(_gaps(stored, _FOUR), 0)
    else:
        rows_size, cols_size = number(one["rows_size"]), number(one["cols_size"])
        if rows_size + cols_size != stored.size:
            raise ValueError(f"tensor {name!r} has {stored.size:,} bytes of rows and columns")
        kinds = (one.get("row_dtype", _FOUR), one.get("col_dtype", _FOUR)) if row.narrow else (_FOUR, _FOUR)
        rows, columns = (_gaps(each, kind) for each, kind in zip(np.split(stored, [rows_size]), kinds, strict=True))
        positions = _flat(rows, columns, shape)
    if positions.size != number(one["num_nonzero"]):
        raise ValueError(f"tensor {name!r} has {positions.size:,} positions and says {one['num_nonzero']:,}")
    return name, dtype, shape, positions, values, end


def _gaps(stored: Array, kind: object) -> Array:
    """Gaps, as int64.

    Raises:
        ValueError: they are of an unknown dtype, or negative.
    """
    if kind not in _DTYPES:
        raise ValueError(f"gaps of dtype {str(kind)[:40]!r}; {', '.join(_DTYPES)} are known")
    found = viewed(stored, _DTYPES[str(kind)]).astype(np.int64)
    if found.size and found.min() < 0:
        raise ValueError("gaps that are negative")
    return found


def _flat(row_gaps: Array, column_gaps: Array, shape: tuple[int, ...]) -> Array:
    """Positions from the gaps of rows and of columns.

    Raises:
        ValueError: there are more of one than of the other, or a column is beyond its row.
    """
    if row_gaps.size != column_gaps.size:
        raise ValueError(f"{row_gaps.size:,} rows and {column_gaps.size:,} columns")
    if not row_gaps.size:
        return np.zeros(0, np.int64)
    first = row_gaps != 0
    first[0] = True
    begins = np.flatnonzero(first)
    sums = np.cumsum(column_gaps)
    columns = sums - np.repeat((sums - column_gaps)[begins], np.diff(begins, append=row_gaps.size))
    rows, width = np.cumsum(row_gaps), _columns(shape)
    if columns.max() >= width or rows[-1] >= _MOST:
        raise ValueError(f"columns beyond {width:,}, or rows beyond 2^31")
    found: Array = rows * width + columns
    return found


def _write(
    folder: Path,
    base: Checkpoint,
    changes: Iterable[Change],
    format: str,
    window: str,
    prev_window: str,
    anchor_window: str,
    checksum: str,
) -> None:
    """Writes the folder without the wallet's signature."""
    with importing("a step of grail"):
        import zstandard
    row = FORMATS.find(format)
    if checksum not in (_NO_CHECKSUM, _XXH3):
        raise ArgumentError(f"checksum {checksum!r} is unknown; take {_NO_CHECKSUM}, {_XXH3}")
    tensors: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    changed: dict[str, tuple[Array, Array]] = {}
    end = 0
    for name, old, new in changes:
        at, slot = different(old, new), base[name]
        if not at.size:
            continue
        if slot.dtype.name not in _VALUES:
            raise DeltaError(
                f"tensor {name!r} is {slot.dtype.name}, which the wire grail has no form for; take another wire"
            )
        if old.size >= _MOST:
            raise DeltaError(
                f"tensor {name!r} has {old.size:,} elements, and grail's rows are int32; take another wire"
            )
        changed[name] = at, new[at]
        about, indices = _encoded(at, slot.shape, row)
        values = new[at].tobytes()
        sizes = {"indices_offset": end, "indices_size": len(indices), **about["sizes"]}
        sizes |= {"values_offset": end + len(indices), "values_size": len(values)}
        kinds = {"value_dtype": slot.dtype.name, **about["kinds"]}
        tensors.append({"name": name, "shape": list(slot.shape), "num_nonzero": int(at.size), **kinds, **sizes})
        blobs += indices, values
        end += len(indices) + len(values)
    header = json.dumps({"version": row.version, "tensors": tensors}, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(struct.pack("<I", len(header)) + header + b"".join(blobs))
    total, nonzero = sum(slot.numel for slot in base.values()), sum(at.size for at, _ in changed.values())
    delta = {
        "format": format,
        "threshold": 0.0,
        "prev_window": int(prev_window),
        "anchor_window": int(anchor_window),
        "shapes": {one["name"]: one["shape"] for one in tensors},
        "total_params": total,
        "nonzero_params": nonzero,
        "sparsity_ratio": 1 - nonzero / total if total else 1.0,
    }
    files = {_DATA: packed, _ABOUT: json.dumps(delta, ensure_ascii=False, indent=2).encode()}
    metadata = {
        "window": int(window),
        "file_manifest": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "checkpoint_type": _MARK,
        "prev_window": int(prev_window),
        "anchor_window": int(anchor_window),
        "weights_hash": _hash(base, changed) if checksum == _XXH3 else None,
    }
    files |= {_METADATA: json.dumps(metadata, indent=2).encode(), _MARK: b""}
    with os_errors(folder):
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _encoded(at: Array, shape: tuple[int, ...], row: SparseFormat) -> tuple[dict[str, dict[str, Any]], bytes]:
    """(what the header says of positions, their bytes)."""
    if row.flat:
        return {"sizes": {}, "kinds": {}}, np.diff(at, prepend=0).astype("<i4").tobytes()
    rows, columns = np.divmod(at, _columns(shape))
    row_gaps = np.diff(rows, prepend=0)
    column_gaps = np.where(row_gaps != 0, columns, np.diff(columns, prepend=0))
    kinds = {}
    if row.narrow:
        kinds = {"row_dtype": _kind(row_gaps, ("uint8", "uint16")), "col_dtype": _kind(column_gaps, ("uint16",))}
    stored = [
        gaps.astype(_DTYPES[kinds.get(which, _FOUR)]).tobytes()
        for gaps, which in ((row_gaps, "row_dtype"), (column_gaps, "col_dtype"))
    ]
    return {"sizes": {"rows_size": len(stored[0]), "cols_size": len(stored[1])}, "kinds": kinds}, b"".join(stored)


def _kind(gaps: Array, kinds: tuple[str, ...]) -> str:
    """The narrowest of some dtypes that holds all gaps."""
    return next((kind for kind in kinds if gaps.max() <= np.iinfo(kind).max), _FOUR)


def _hash(base: Checkpoint, changed: dict[str, tuple[Array, Array]]) -> str:
    """The checksum of the model after the step."""
    digest = _xxh3()
    for name in sorted(base):
        bits = base.bits(name)
        if name in changed:
            at, values = changed[name]
            bits = assigned(name, bits, at, values)
        digest.update(bits.view(np.uint8).data)
    return digest.hexdigest()


WIRES.add(
    Wire(
        "grail",
        "delta checkpoints of grail, rows and columns as in the PULSE paper",
        _read,
        _write,
        {
            "format": "sparse_codec_v3.1",
            "window": "1",
            "prev_window": "0",
            "anchor_window": "0",
            "checksum": _NO_CHECKSUM,
        },
    )
)
