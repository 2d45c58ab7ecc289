"""Describes the contents of a `.shd` file as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shiradelta.errors import printable
from shiradelta.format.entropy import entropy
from shiradelta.io.reader import Delta
from shiradelta.util import text

#: Version of the format -> the first release that reads it.
RELEASES = {"1.0": "0.1.0"}


def describe(delta: Delta) -> dict[str, Any]:
    """Describes each tensor and the whole file: sizes in bytes, fingerprints in hexadecimal."""
    tensors: list[dict[str, Any]] = []
    for name, tensor in delta.items():
        record = tensor.record
        stored = record.index.stored + record.values.stored
        tensors.append(
            {
                "name": name,
                "op": tensor.op,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "nnz": tensor.nnz,
                "density": tensor.nnz / max(tensor.numel, 1),
                "index_codec": record.index_codec_name,
                "value_codec": record.value_codec_name,
                "zstd": record.index.zstd or record.values.zstd,
                "index_bytes": record.index.stored,
                "value_bytes": record.values.stored,
                "bits_per_nonzero": stored * 8 / max(tensor.nnz, 1),
                "base_fingerprint": _hex(tensor.base_fingerprint),
                "result_fingerprint": _hex(tensor.result_fingerprint),
            }
        )
    nnz = delta.nnz
    bound = sum(entropy(t["nnz"], max(math.prod(t["shape"]), 1)) * t["nnz"] for t in tensors)
    return {
        "file": delta.file,
        "version": delta.version,
        "needs": _reader(delta),
        "packed": delta.packed,
        "digest": delta.digest,
        "metadata": delta.metadata,
        "nnz": nnz,
        "bytes": dict(delta.sizes),
        "bits_per_nonzero": delta.sizes["file"] * 8 / max(nnz, 1),
        "entropy": bound / max(nnz, 1),
        "tensors": tensors,
    }


def summary(about: Mapping[str, Any], width: int | None = None) -> str:
    """Formats `describe`'s result for people: a table of the tensors, the metadata, and a line of totals.

    Args:
        about: what `describe` returns.
        width: columns of the terminal.
    """
    rows = [["tensor", "op", "dtype", "shape", "nonzeros", "density", "index", "values", "bits/nonzero"]]
    for t in about["tensors"]:
        figures = [f"{t['nnz']:,}", text.percent(t["density"]), t["index_codec"], t["value_codec"]]
        bits = f"{t['bits_per_nonzero']:.2f}"
        rows.append([t["name"], t["op"], t["dtype"], text.shape(t["shape"]), *figures, bits])
    pairs = [f"{printable(key)}: {text.brief(value)}" for key, value in about["metadata"].items()]
    file = printable(str(about["file"] or "stdin"))
    whole = (
        f"{file}: format {about['version']}, {text.count(about['tensors'], 'tensor')},"
        f" {text.count(about['nnz'], 'nonzero')}, {text.size(about['bytes']['file'])},"
        f" {about['bits_per_nonzero']:.2f} bits per nonzero"
        f" (entropy of the positions {about['entropy']:.2f})"
    )
    return "\n".join([text.table(rows, width=width), *pairs, f"needs {about['needs']}", whole])


def _reader(delta: Delta) -> str:
    """The oldest reader that takes the file."""
    release = RELEASES.get(delta.version)
    ours = "" if release is None else f" (shiradelta {release})"
    zstd = delta.packed or any(tensor.record.index.zstd or tensor.record.values.zstd for tensor in delta.values())
    return f"a reader of format {delta.version}{ours} or later{', with zstd' if zstd else ''}"


def _hex(fingerprint: int | None) -> str | None:
    return None if fingerprint is None else f"{fingerprint:016x}"
