"""Adds tensors to the files of a model's folder, and removes them.

The new files are written beside the journal and then swapped with the originals, which are kept there.  So undoing is a
rename, and exact.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiradelta.errors import BaseMismatchError
from shiradelta.folder.plan import FolderPlan
from shiradelta.format import registry
from shiradelta.format.delta import TensorDelta
from shiradelta.models.checkpoint import Checkpoint, index_file
from shiradelta.models.safetensors import Shard
from shiradelta.util.files import os_errors, sync_directory
from shiradelta.util.json_files import read_json

_NEW = ".new"


def prepare(checkpoint: Checkpoint, plan: FolderPlan, originals: Path) -> tuple[str, ...]:
    """Writes the new files to `originals` with the suffix .new, and returns their names relative to the root."""
    with os_errors(originals):
        originals.mkdir(parents=True, exist_ok=True)
        replaced: list[str] = []
        dropped = {(edit.slot.file, edit.slot.name) for edit in plan.drop}
        homes = [(home_of(checkpoint, name), name, tensor) for name, tensor in plan.new]
        for shard in checkpoint.shards:
            gone = {name for file, name in dropped if file == shard.file}
            come = {name.rpartition("/")[2]: tensor for home, name, tensor in homes if home is shard}
            if gone or come:
                relative = shard.file.relative_to(checkpoint.root)
                _rewrite(shard, gone, come, _staged(originals, relative))
                replaced.append(relative.as_posix())
                replaced += _reindex(checkpoint.root, shard, gone, come, originals, replaced)
        sync_directory(originals)
    return tuple(replaced)


def home_of(checkpoint: Checkpoint, name: str) -> Shard:
    """The file that a new tensor is written to: the last one of its component."""
    component = name.rpartition("/")[0]
    folder = checkpoint.root / component
    homes = [shard for shard in checkpoint.shards if shard.file.parent == folder]
    if not homes:
        raise BaseMismatchError(f"tensor {name!r} is to be added, but {checkpoint.root} has no component {component!r}")
    return homes[-1]


def _staged(originals: Path, relative: Path) -> Path:
    path = originals / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + _NEW)


def _rewrite(shard: Shard, gone: set[str], come: Mapping[str, TensorDelta], target: Path) -> None:
    """Copies a safetensors file without some tensors, and with others appended."""
    header: dict[str, Any] = {}
    if "__metadata__" in shard.header:
        header["__metadata__"] = shard.header["__metadata__"]
    kept = [slot for slot in sorted(shard.slots, key=lambda slot: slot.offset) if slot.name not in gone]
    cursor = 0

    def append(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal cursor
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, cursor + size]}
        cursor += size

    for slot in kept:
        append(slot.name, slot.dtype.safetensors, slot.shape, slot.nbytes)
    for name, tensor in come.items():
        dtype = registry.DTYPE_OF_NAME[tensor.dtype]
        append(name, dtype.safetensors, tensor.shape, tensor.numel * dtype.size)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(shard.file, "rb") as source, open(target, "wb") as output:
        output.write(len(raw).to_bytes(8, "little") + raw)
        for slot in kept:
            source.seek(slot.offset)
            remaining = slot.nbytes
            while remaining:
                chunk = source.read(min(remaining, 1 << 20))
                output.write(chunk)
                remaining -= len(chunk)
        for tensor in come.values():
            output.write(tensor.bits().tobytes())
        output.flush()
        os.fsync(output.fileno())
    shutil.copymode(shard.file, target)


def _reindex(
    root: Path,
    shard: Shard,
    gone: set[str],
    come: Mapping[str, TensorDelta],
    originals: Path,
    replaced: list[str],
) -> list[str]:
    """Writes the updated index of a sharded model; returns its name, unless `replaced` has it already."""
    index = index_file(shard.file.parent)
    if index is None:
        return []
    relative = index.relative_to(root)
    staged = _staged(originals, relative)
    content = read_json(staged if staged.exists() else index)
    weight_map = content["weight_map"]
    for name in gone:
        weight_map.pop(name, None)
    weight_map |= dict.fromkeys(come, shard.file.name)
    with open(staged, "w", encoding="utf-8") as output:
        json.dump(content, output, indent=2, sort_keys=True)
        output.flush()
        os.fsync(output.fileno())
    return [] if relative.as_posix() in replaced else [relative.as_posix()]


def swap_in(root: Path, originals: Path, replaced: tuple[str, ...]) -> None:
    """Puts the new files in place and keeps the originals."""
    for name in replaced:
        os.replace(root / name, originals / name)
        os.replace(originals / (name + _NEW), root / name)
    _sync(root, originals, replaced)


def swap_out(root: Path, originals: Path, replaced: tuple[str, ...]) -> None:
    """Puts back the originals that were moved."""
    for name in replaced:
        if (originals / name).exists():
            os.replace(originals / name, root / name)
    if replaced:
        _sync(root, originals, replaced)


def _sync(root: Path, originals: Path, replaced: tuple[str, ...]) -> None:
    for folder in {(base / name).parent for name in replaced for base in (root, originals)}:
        sync_directory(folder)
