"""Hugging Face's delta weight sync for TRL: sparse patches and whole models in a bucket, as safetensors files.

`deltas/step_NNNNNN.safetensors` has two tensors for each parameter that changes: where, and the elements there.  As
announced (encoding "indices") they are `NAME.indices`, int32, and `NAME.values`, and the metadata list the parameters.
In the pull request to TRL they are `NAME.idx` and `NAME.val`, and the metadata name an encoding: "raw", int32, or
"gap_delta", the gaps between positions less one, in two bytes each, or four where one gap needs it.
`anchors/step_NNNNNN.safetensors` has all parameters.  A checksum, where there is one, is the SHA-256 of all parameters'
bytes after the step, by name.
Read in the announcement of May 2026 (delta-weight-sync) and in huggingface/trl#5417 and #5937, of which TRL 1.16 has
neither: trl/experimental/async_grpo/delta_engine.py, delta_codec.py and weight_diff.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shiradelta.chain.wires.checks import Change, assigned, described, positions_of_gaps, target, verified
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import DeltaError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot, Unwritten, read_shard, write_tensors
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors
from shiradelta.util.registry import Registry

_FOLDERS = ("deltas", "anchors")
_FORMATS = {"sparse_weight_patch": True, "anchor_checkpoint": False}
_FLAGS = {"True": True, "False": False}
#: What TRL writes when nothing has changed, since it has to write a tensor.
_EMPTY = "__empty_delta__"
_MOST_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class IndexEncoding:
    """How the positions of a parameter are stored.

    Attributes:
        name: what the metadata, or the announcement, call it.
        suffixes: what follows the parameter's name, for positions and for elements.
        dtypes: the dtypes that positions may have, narrow ones first.
        encode: positions -> what is stored.
        decode: what is stored -> positions.
    """

    name: str
    suffixes: tuple[str, str]
    dtypes: tuple[str, ...]
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


def _as_signed(stored: Array) -> Array:
    return stored.view(np.int32)


def _gaps(positions: Array) -> Array:
    gaps = np.diff(positions, prepend=-1) - 1
    return gaps.astype("<u2" if gaps.max() < 1 << 16 else "<u4")


def _absolute(positions: Array) -> Array:
    return positions.astype("<u4")


ENCODINGS = Registry(
    "encoding of positions",
    (
        IndexEncoding(
            "gap_delta", (".idx", ".val"), ("uint16", "uint32"), _gaps, lambda gaps: positions_of_gaps(gaps, 1)
        ),
        IndexEncoding("raw", (".idx", ".val"), ("int32",), _absolute, _as_signed),
        IndexEncoding("indices", (".indices", ".values"), ("int32",), _absolute, _as_signed),
    ),
)


def _read(source: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a file, or of a bucket that holds one alone."""
    file = source
    if source.is_dir():
        found = [path for folder in _FOLDERS for path in sorted((source / folder).glob("*.safetensors"))]
        if len(found) != 1:
            what = f"{found[0]}, {found[1]}, ..." if found else "no deltas/step_NNNNNN.safetensors"
            raise SourceError(f"{source}: holds {what}; give the file of one step")
        file = found[0]
    shard = read_shard(file)
    metadata, slots = shard.metadata, {slot.name: slot for slot in shard.slots}
    with described(str(file)):
        sparse = _FLAGS[metadata["sparse"]] if "sparse" in metadata else _FORMATS[metadata["format"]]
        changes = _sparse(file, base, slots, metadata) if sparse else _whole(file, base, slots)
    wanted = metadata.get("checksum_sha256")
    yield from verified(str(file), base, changes, hashlib.sha256(), wanted) if wanted else changes


def _whole(file: Path, base: Checkpoint, slots: dict[str, Slot]) -> Iterator[Change]:
    for name, slot in sorted(slots.items()):
        target(f"{file}: tensor {name!r}", name, base, slot.dtype.name, slot.shape)
        yield name, base.bits(name), bits_of(slot)


def _sparse(file: Path, base: Checkpoint, slots: dict[str, Slot], metadata: dict[str, str]) -> Iterator[Change]:
    """The changes of a file of patches.

    Raises:
        ValueError, KeyError: its metadata or names are damaged.
        SourceError: it is of an encoding that is unknown.
    """
    encoding = metadata.get("encoding", "indices")
    if encoding not in ENCODINGS:
        raise SourceError(f"{file}: has encoding {encoding[:40]!r}; {', '.join(ENCODINGS)} are known")
    row = ENCODINGS[encoding]
    where, what = row.suffixes
    slots = slots if list(slots) != [_EMPTY] else {}
    names = sorted(name.removesuffix(what) for name in slots if name.endswith(what))
    if {name + suffix for name in names for suffix in row.suffixes} != set(slots):
        raise ValueError(f"not every parameter has one tensor {where} and one {what}")
    if "changed_params" in metadata and sorted(json.loads(metadata["changed_params"])) != names:
        raise ValueError("its list of parameters is not that of its tensors")
    return _patches(file, base, [(name, slots[name + where], slots[name + what]) for name in names], row)


def _patches(
    file: Path, base: Checkpoint, patches: Iterable[tuple[str, Slot, Slot]], row: IndexEncoding
) -> Iterator[Change]:
    for name, positions, values in patches:
        where = f"{file}: tensor {name!r}"
        target(where, name, base, values.dtype.name)
        if positions.dtype.name not in row.dtypes:
            raise SourceError(
                f"{where} has positions of dtype {positions.dtype.name}; {', '.join(row.dtypes)} are known"
            )
        old = base.bits(name)
        yield name, old, assigned(where, old, row.decode(bits_of(positions)), bits_of(values))


def _write(folder: Path, base: Checkpoint, changes: Iterable[Change], encoding: str, version: str) -> None:
    """Writes deltas/step_NNNNNN.safetensors."""
    row = ENCODINGS.find(encoding)
    names, tensors, changed = [], [], 0
    for name, old, new in changes:
        at, slot = different(old, new), base[name]
        if not at.size:
            continue
        if old.size >= _MOST_ELEMENTS:
            raise DeltaError(f"tensor {name!r} has {old.size:,} elements, and positions are int32; take another wire")
        names.append(name)
        changed += at.size
        stored = row.encode(at)
        kind = next(dtype for dtype in row.dtypes if DTYPE_OF_NAME[dtype].size == stored.itemsize)
        for suffix, dtype, data in zip(row.suffixes, (kind, slot.dtype.name), (stored, new[at]), strict=True):
            tensors.append(Unwritten(name + suffix, (data.size,), DTYPE_OF_NAME[dtype], lambda data=data: data))  # type: ignore[misc]
    total = sum(slot.numel for slot in base.values())
    metadata = {
        "format": "sparse_weight_patch",
        "version": "1",
        "sparse": "True",
        "model_version": str(int(version)),
        "num_changed_params": str(len(names)),
        "total_changed_elements": str(changed),
        "total_elements": str(total),
        "sparsity": str(1 - changed / max(total, 1)),
        **({"changed_params": json.dumps(names)} if encoding == "indices" else {"encoding": encoding}),
    }
    path = folder / _FOLDERS[0] / f"step_{int(version):06d}.safetensors"
    with os_errors(folder):
        path.parent.mkdir()
        with open(path, "w+b") as stream:
            write_tensors(stream, tensors, metadata)


WIRES.add(
    Wire(
        "huggingface",
        "deltas and anchors of Hugging Face's delta weight sync for TRL",
        _read,
        _write,
        {"encoding": "gap_delta", "version": "1"},
    )
)
