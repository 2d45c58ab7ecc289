"""Adds tensors to the files of a model's folder, removes and replaces them.

The new files are written beside the undo deltas, with all their changes, and then put in the place of the originals,
which keep a second name there.  So at every moment each file is the original or the new one, and undoing is exact.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from shiradelta.errors import BaseMismatchError
from shiradelta.folder.plan import Edit, FolderPlan
from shiradelta.format import arithmetic, registry
from shiradelta.format.delta import TensorDelta
from shiradelta.format.windows import Cursor
from shiradelta.models.checkpoint import Checkpoint, index_file
from shiradelta.models.safetensors import Shard, Unwritten, header_of
from shiradelta.util.arrays import ranges
from shiradelta.util.directory import Directory
from shiradelta.util.json_files import read_json

_NEW = ".new"
_BACK = ".back"


def prepare(
    folder: Directory, checkpoint: Checkpoint, plan: FolderPlan, originals: Directory, strength: float
) -> dict[str, str]:
    """Writes the new files to `originals` with the suffix .new, durably; returns name -> SHA-256 of each."""
    made: dict[str, str] = {}
    indexes: dict[str, Any] = {}
    for shard, gone, come in _changes(checkpoint, plan):
        file = shard.file.relative_to(checkpoint.root).as_posix()
        edits = {edit.slot.name: edit for edit in plan.edits if edit.slot.file == shard.file}
        made[file] = _rewrite(folder, file, shard, gone, come, edits, strength, originals)
        index = index_file(shard.file.parent)
        if index is not None:
            name = index.relative_to(checkpoint.root).as_posix()
            weight_map = indexes.setdefault(name, read_json(index))["weight_map"]
            for each in gone:
                weight_map.pop(each, None)
            weight_map |= dict.fromkeys(come, shard.file.name)
    for name, content in indexes.items():
        raw = json.dumps(content, indent=2, sort_keys=True).encode()
        home, own = _below(originals, name)
        with home.making(own + _NEW, _mode(folder, name)) as output:
            output.write(raw)
        made[name] = hashlib.sha256(raw).hexdigest()
    _sync(originals, made)
    return made


def _changes(checkpoint: Checkpoint, plan: FolderPlan) -> Iterator[tuple[Shard, set[str], dict[str, TensorDelta]]]:
    """(file, names that go, tensors that come) of each file that is rewritten."""
    dropped = {(edit.slot.file, edit.slot.name) for edit in plan.drop}
    homes = [(home_of(checkpoint, name), name, tensor) for name, tensor in plan.new]
    for shard in checkpoint.shards:
        gone = {name for file, name in dropped if file == shard.file}
        come: dict[str, TensorDelta] = {
            name.rpartition("/")[2]: tensor for home, name, tensor in homes if home is shard
        }
        if gone or come:
            yield shard, gone, come


def rewritten_files(checkpoint: Checkpoint, plan: FolderPlan) -> set[str]:
    """The files that `prepare` writes anew, indexes too."""
    shards = {shard.file for shard, _, _ in _changes(checkpoint, plan)}
    indexes = {index for file in shards if (index := index_file(file.parent)) is not None}
    return {file.relative_to(checkpoint.root).as_posix() for file in shards | indexes}


def home_of(checkpoint: Checkpoint, name: str) -> Shard:
    """The file that a new tensor is written to: that of the tensor that it replaces, or the component's last one."""
    component = name.rpartition("/")[0]
    if name in checkpoint:
        return next(shard for shard in checkpoint.shards if shard.file == checkpoint[name].file)
    folder = checkpoint.root / component
    homes = [shard for shard in checkpoint.shards if shard.file.parent == folder]
    if not homes:
        raise BaseMismatchError(f"tensor {name!r} is to be added, but {checkpoint.root} has no component {component!r}")
    return homes[-1]


def _rewrite(
    folder: Directory,
    file: str,
    shard: Shard,
    gone: set[str],
    come: Mapping[str, TensorDelta],
    edits: Mapping[str, Edit],
    strength: float,
    originals: Directory,
) -> str:
    """Copies a safetensors file without some tensors, with others patched and others appended; returns its SHA-256."""
    kept = [slot for slot in sorted(shard.slots, key=lambda slot: slot.offset) if slot.name not in gone]
    added = [
        Unwritten(name, tensor.shape, registry.DTYPE_OF_NAME[tensor.dtype], tensor.bits)
        for name, tensor in come.items()
    ]
    header = header_of([*kept, *added], shard.stored_metadata)
    source_home, source_name = folder.home(file)
    home, name = _below(originals, file)
    with (
        source_home.reading(source_name) as source,
        home.making(name + _NEW, _mode(folder, file)) as stream,
    ):
        output = _HashedOutput(stream)
        output.write(header)
        for slot in kept:
            source.seek(slot.offset)
            edit = edits.get(slot.name)
            delta = None if edit is None else Cursor(edit.tensor)
            for start, stop in ranges(slot.numel):
                block = np.frombuffer(source.read((stop - start) * slot.dtype.size), slot.dtype.bits)
                if edit is not None and delta is not None:
                    block = block.copy()
                    for positions, bits in delta.until(start + block.size):
                        at = positions - start
                        block[at] = arithmetic.result(edit.tensor.operation, bits, block[at], slot.dtype.name, strength)
                output.write(block.tobytes())
        for tensor in come.values():
            for bits in tensor.bits_windows():
                output.write(bits.tobytes())
    return output.digest.hexdigest()


class _HashedOutput:
    """Writes to a stream, and hashes what it writes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.digest.update(data)


def swap_in(folder: Directory, originals: Directory, replaced: Iterable[str]) -> None:
    """Puts the new files in place and keeps the originals.

    The originals' second names are durable before a new file takes the first one.
    """
    names = list(replaced)
    for name in names:
        home, own = folder.home(name)
        home.keep(own, *_below(originals, name))
    _sync(originals, names)
    for name in names:
        inside, own = _below(originals, name)
        inside.move(own + _NEW, *folder.home(name))
    _sync(folder, names)
    _sync(originals, names)


def put_back(folder: Directory, originals: Directory, replaced: Iterable[str]) -> None:
    """Puts originals back.  They keep their second name, so this can be repeated after an interruption."""
    names = list(replaced)
    for name in names:
        inside, own = originals.home(name)
        inside.remove(own + _BACK)
        inside.keep(own, inside, own + _BACK)
        inside.move(own + _BACK, *folder.home(name))
    _sync(folder, names)


def saved_files(originals: Directory | None, replaced: Iterable[str]) -> list[str]:
    """Those of some files whose originals were kept."""
    if originals is None:
        return []
    found = []
    for name in replaced:
        folder, _, own = name.rpartition("/")
        if not folder or originals.status(folder) is not None:
            home = originals.folder(folder) if folder else originals
            if home.status(own) is not None:
                found.append(name)
    return found


def kept_files(originals: Directory) -> list[str]:
    """The files whose originals are in a folder, relative to the model's."""
    found = []
    for name in originals.names():
        status = originals.status(name)
        if status is not None and stat.S_ISDIR(status.st_mode):
            found += [f"{name}/{inner}" for inner in originals.folder(name).names()]
        else:
            found.append(name)
    return [name for name in found if not name.endswith((_NEW, _BACK))]


def _below(originals: Directory, name: str) -> tuple[Directory, str]:
    """The folder, made if there is none, and the name of a file among the originals."""
    folder, _, own = name.rpartition("/")
    return (originals.make_folder(folder) if folder else originals), own


def _mode(folder: Directory, name: str) -> int | None:
    home, own = folder.home(name)
    status = home.status(own)
    return None if status is None else stat.S_IMODE(status.st_mode)


def _sync(folder: Directory, names: Iterable[str]) -> None:
    """Syncs the folders of some files, and the folder itself."""
    inner = {name.rpartition("/")[0] for name in names}
    for each in sorted(inner - {""}):
        folder.folder(each).sync()
    folder.sync()
