"""Steps as the trainers of other projects write them, by their published layouts: plain code, nothing of the package.

A step is a list of `Part`s.  A test may change them before they are written, so that checksums fit what is wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from tests.chain.models import Array, Model

_SAFETENSORS = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "uint8": "U8", "int32": "I32", "uint16": "U16"}


@dataclass
class Part:
    """What a step says of a tensor that changes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: Array
    values: Array
    old: Array
    new: Array


def parts_of(before: Model, after: Model) -> list[Part]:
    """What differs."""
    found = []
    for name, (dtype, shape, new) in sorted(after.items()):
        old = before[name][2]
        at = np.flatnonzero(old != new)
        if at.size:
            found.append(Part(name, dtype, shape, at, new[at], old, new))
    return found


def safetensors(tensors: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file of one-dimensional tensors: name -> (dtype, bits), large elements first."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    for name, (dtype, bits) in ordered:
        span = [end, end := end + bits.nbytes]
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": [bits.size], "data_offsets": span}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + b"".join(bits.tobytes() for _, (_, bits) in ordered)


def _hash(bits: Array, dtype: str) -> int:
    """torch.hash_tensor."""
    if dtype == "bfloat16":
        bits, dtype = bits.astype("<u4") << 16, "float32"
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = bits.view({"float16": "<f2", "float32": "<f4", "uint8": "<u1"}[dtype]).astype(
            "<i8" if dtype == "uint8" else "<f8"
        )
    return reduce(xor, wide.view("<u8").tolist(), 0)


def as_verl(folder: Path, parts: list[Part], before: Model, has_dense: bool = True) -> None:
    """A flush for each dtype; integers and NaN in dense ones, unless there are to be none."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        is_float = part.dtype != "uint8"
        bits = part.values.astype("<u4") << 16 if part.dtype == "bfloat16" else part.values
        kind = {"float16": "<f2"}.get(part.dtype, "<f4")
        whole = not is_float or (has_dense and bool(np.isnan(bits.view(kind)).any()))
        groups.setdefault(("dense" if whole else "indices", part.dtype), []).append(part)
    folder.mkdir()
    for number, ((encoding, dtype), some) in enumerate(sorted(groups.items(), reverse=True)):
        is_last = number == len(groups) - 1
        blobs: list[list[Array]] = [[np.zeros(0, "u1")], []]
        params, at, begin = [], 0, 0
        for part in some:
            sparse = encoding == "indices"
            positions = part.at.astype("<i4").view("u1") if sparse else np.zeros(0, "u1")
            values = part.values if sparse else part.new
            blobs[0].append(positions)
            blobs[1].append(values)
            about = {"name": part.name, "dtype": part.dtype, "shape": list(part.shape)}
            spans = {"pos_start": at, "pos_end": at + positions.size, "pos_width": 4}
            params.append({**about, **spans, "val_start": begin, "val_end": begin + values.size})
            at, begin = at + positions.size, begin + values.size
        positions, values = map(np.concatenate, blobs)
        spec: dict[str, Any] = {"encoding": encoding}
        spec |= {"verify": False, "is_last": is_last} if encoding == "dense" else {}
        spec |= {"params": params, "checksum": _hash(positions, "uint8") ^ (_hash(values, dtype) << 1)}
        tensors = {"__delta_spec__": ("uint8", np.frombuffer(json.dumps(spec).encode(), "u1"))}
        tensors["__values__"] = dtype, values
        if encoding == "indices":
            tensors["__positions__"] = "uint8", positions
        (folder / f"flush-{number:05d}.safetensors").write_bytes(safetensors(tensors, {"is_last": str(is_last)}))


def as_huggingface(
    folder: Path, parts: list[Part], before: Model, encoding: str = "gap_delta", **metadata: str
) -> None:
    """A bucket's file of patches; more metadata may stand behind its own."""
    tensors: dict[str, tuple[str, Array]] = {}
    where, what = (".indices", ".values") if encoding == "indices" else (".idx", ".val")
    for part in parts:
        gaps = np.diff(part.at, prepend=-1) - 1
        stored = ("uint16", gaps.astype("<u2")) if encoding == "gap_delta" else ("int32", part.at.astype("<i4"))
        tensors |= {part.name + where: stored, part.name + what: (part.dtype, part.values)}
    changed, total = sum(part.at.size for part in parts), sum(bits.size for _, _, bits in before.values())
    about = {
        "format": "sparse_weight_patch",
        "version": "1",
        "sparse": "True",
        "model_version": "1",
        "num_changed_params": str(len(parts)),
        "total_changed_elements": str(changed),
        "total_elements": str(total),
        "sparsity": str(1.0 - changed / total),
    }
    names = json.dumps([part.name for part in parts])
    about |= {"changed_params": names} if encoding == "indices" else {"encoding": encoding}
    (folder / "deltas").mkdir(parents=True)
    (folder / "deltas" / "step_000001.safetensors").write_bytes(safetensors(tensors, {**about, **metadata}))


def as_nemo(folder: Path, parts: list[Part], before: Model, encoding: str = "xor") -> None:
    """One payload and its request."""
    import torch

    groups: dict[int, list[Array]] = {}
    items: list[dict[str, Any]] = []
    locations = b""
    for part in parts:
        group = groups.setdefault(part.values.itemsize, [])
        begin, start = len(locations), sum(values.size for values in group)
        old = part.old[np.minimum(part.at, part.old.size - 1)][: part.values.size]
        group.append(part.values ^ np.resize(old, part.values.size) if encoding == "xor" else part.values)
        span = {"index_encoding": "range", "range_start": int(part.at[0])}
        if part.at[-1] - part.at[0] + 1 != part.at.size:
            span = {"index_encoding": "deltas"}
            locations += (np.diff(part.at, prepend=-1) - 1).astype("<u2").tobytes()
        items.append(
            {
                "name": part.name,
                "shape": part.shape,
                "dtype": part.dtype,
                "operation": encoding,
                "index_start": begin,
                "index_end": len(locations),
                "value_group": list(groups).index(part.values.itemsize),
                "value_start": start,
                "value_end": start + part.values.size,
                **span,
            }
        )
    kinds = {1: "u1", 2: "<i2", 4: "<i4"}
    values = tuple(torch.from_numpy(np.concatenate(some).view(kinds[size])) for size, some in groups.items())
    stream = io.BytesIO()
    torch.save((torch.frombuffer(bytearray(locations), dtype=torch.uint8), values, items), stream)
    body = zstandard.ZstdCompressor(level=1).compress(stream.getvalue())
    folder.mkdir()
    (folder / "000000.pt").write_bytes(body)
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    request = {"key": "000000.pt", "checksum": digest, "verification_candidates": 0}
    (folder / "000000.json").write_text(json.dumps(request))


def as_grail(folder: Path, parts: list[Part], before: Model, format: str = "sparse_codec_v3.1") -> None:
    """A window's DELTA folder, without its signature."""
    version = {"sparse_codec_v2": 2, "sparse_codec_v3": 3, "sparse_codec_v3.1": 31}[format]
    tensors, data = [], b""
    for part in parts:
        width = math.prod(part.shape[1:])
        row = last = 0
        gaps: list[tuple[int, int]] = []
        for at in part.at.tolist():
            new_row, column = divmod(at, width)
            gaps.append((new_row - row, column - last if new_row == row else column))
            row, last = new_row, column
        kinds = {"row_dtype": "uint8", "col_dtype": "uint16"} if version == 31 else {}
        form = {31: ("u1", "<u2")}.get(version, ("<i4", "<i4"))
        rows, columns = (
            np.array(some).astype(kind).tobytes() for some, kind in zip(zip(*gaps, strict=True), form, strict=True)
        )
        sizes = {"rows_size": len(rows), "cols_size": len(columns)}
        indices, values = rows + columns, part.values.tobytes()
        if version == 2:
            indices, sizes = np.diff(part.at, prepend=0).astype("<i4").tobytes(), {}
        about = {"name": part.name, "shape": list(part.shape), "num_nonzero": part.at.size, "value_dtype": part.dtype}
        places = {"indices_offset": len(data), "indices_size": len(indices), **sizes}
        places |= {"values_offset": len(data) + len(indices), "values_size": len(values)}
        tensors.append({**about, **kinds, **places})
        data += indices + values
    header = json.dumps({"version": version, "tensors": tensors}, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=1).compress(struct.pack("<I", len(header)) + header + data)
    total, changed = sum(bits.size for _, _, bits in before.values()), sum(part.at.size for part in parts)
    delta = {"format": format, "threshold": 0.0, "prev_window": 0, "anchor_window": 0}
    delta |= {"shapes": {part.name: part.shape for part in parts}, "total_params": total, "nonzero_params": changed}
    delta |= {"sparsity_ratio": 1.0 - changed / total}
    files = {"delta_sparse.bin.zst": packed, "delta_metadata.json": json.dumps(delta, indent=2).encode()}
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    metadata = {"window": 1, "file_manifest": digests, "checkpoint_type": "DELTA"}
    metadata |= {"prev_window": 0, "anchor_window": 0, "weights_hash": None}
    folder.mkdir()
    for name, raw in {**files, "metadata.json": json.dumps(metadata, indent=2).encode(), "DELTA": b""}.items():
        (folder / name).write_bytes(raw)


def as_vllm(folder: Path, parts: list[Part], before: Model) -> None:
    """The update info of a request, and what is broadcast."""
    info = {
        "names": [part.name for part in parts],
        "dtype_names": [part.dtype for part in parts],
        "shapes": [part.shape for part in parts],
        "num_updates_list": [part.values.size for part in parts],
    }
    folder.mkdir()
    (folder / "update_info.json").write_text(json.dumps(info))
    data = b"".join(part.at.astype("<i4").tobytes() + part.values.tobytes() for part in parts)
    (folder / "broadcasts.bin").write_bytes(data)


def as_fireworks(folder: Path, parts: list[Part], before: Model, format: str = "arc_v3") -> None:
    """A file of all tensors; with arc_v3 those that change are in envelopes, all of their elements as exceptions."""
    squeeze = zlib.compress if format == "arc_v1" else zstandard.ZstdCompressor(level=3).compress
    tensors: dict[str, tuple[str, Array]] = {}
    sums = {}
    kept = {name: old for name, (_, _, old) in before.items() if name not in [part.name for part in parts]}
    for name, old, new in [*((part.name, part.old, part.new) for part in parts), *((n, b, b) for n, b in kept.items())]:
        tensors[name] = "uint8", np.frombuffer(squeeze((old ^ new).tobytes()), "u1")
        sums[name] = str(zlib.adler32(new.tobytes()))
    for part in parts if format == "arc_v3" else []:
        bits = 8 * part.values.itemsize
        flat = {"count": part.at.size, "dtype": "uint16", "data": np.diff(part.at, prepend=0).astype("<u2").tobytes()}
        order = np.arange(part.values.size)
        others = np.diff(order, prepend=0).astype("u1")
        mantissas = np.zeros(part.at.size, "u1")
        payload = {
            "version": 1,
            "strategy": "mantissa_xor",
            "shape": part.shape,
            "dtype": f"torch.{part.dtype}",
            "checksum": sums[part.name],
            "mantissa_bits": {"bfloat16": 7, "float16": 10, "float32": 23}[part.dtype],
            "total_bits": bits,
            "transform": "xor",
            "mantissa_dtype": "uint8",
            "mantissa_stream": {"kind": "raw", "dtype": "uint8", "data": mantissas.tobytes()},
            "exception_positions": {
                "count": others.size,
                "dtype": "uint8",
                "data": others.tobytes(),
            },
            "exception_dtype": f"uint{bits}",
            "exception_values": part.values.tobytes(),
            "uint_dtype": f"uint{bits}",
            "indices": {**flat, "kind": "flat"},
        }
        raw = zstandard.ZstdCompressor(level=1).compress(pickle.dumps(payload, pickle.HIGHEST_PROTOCOL))
        envelope = pickle.dumps({"codec": "zstd", "data": raw}, pickle.HIGHEST_PROTOCOL)
        tensors[part.name] = "uint8", np.frombuffer(b"ARC3_ENVELOPE\0" + envelope, "u1")
    folder.mkdir()
    names = list(before) + [part.name for part in parts if part.name not in before]
    ordered = {name: tensors[name] for name in names if name in tensors}
    (folder / "model.safetensors").write_bytes(safetensors(ordered, {name: sums[name] for name in ordered}))


#: Wire -> what writes a step as its trainer does.
PLAIN: dict[str, Callable[..., None]] = {
    "fireworks": as_fireworks,
    "grail": as_grail,
    "huggingface": as_huggingface,
    "nemo-rl": as_nemo,
    "verl": as_verl,
    "vllm": as_vllm,
}
