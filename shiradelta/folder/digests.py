"""Digests of weight files: as they are, and as they will be once undo deltas are applied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import Any

import numpy as np

from shiradelta.folder.weights import check_same_tensor
from shiradelta.format.windows import Cursor
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.checkpoint import Checkpoint, index_file
from shiradelta.models.safetensors import Slot, read_shard
from shiradelta.util.directory import Directory
from shiradelta.util.interrupts import Job, uninterrupted
from shiradelta.util.mapping import map_file
from shiradelta.util.threads import THREADS, map_in_threads

#: Bytes that are hashed, and elements that are copied, at a time.
_WINDOW = 1 << 22


def digest_of(folder: Directory, file: str, undos: Sequence[Delta] = (), stopped: Event | None = None) -> str:
    """SHA-256 of a weight file as it is once undo deltas are applied one after the other; it is only read.

    Args:
        folder: the model's folder, or a folder of originals.
        file: the file, relative to it.
        undos: the undo deltas, the one to be applied first in front.
        stopped: set by another thread when the digest is not needed any more.

    Raises:
        TargetError: the file is a link, or its tensors are not those of the undo deltas.
        OSError: it cannot be read.
    """
    home, name = folder.home(file)
    digest = hashlib.sha256()
    with home.reading(name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            return digest.hexdigest()
        data = np.frombuffer(map_file(stream.fileno(), home.path / name, size), np.uint8)
    cursor = 0
    if any(len(undo) for undo in undos):
        component = file.rpartition("/")[0]
        shard = read_shard(home.path / name)
        for slot in sorted(shard.slots, key=lambda slot: slot.offset):
            full = f"{component}/{slot.name}" if component else slot.name
            listed = [undo[full] for undo in undos if full in undo]
            if listed:
                for tensor in listed:
                    check_same_tensor(folder.path, slot, full, tensor)
                _update(digest, data[cursor : slot.offset], stopped)
                cursor = slot.offset + slot.nbytes
                _update_without(digest, data[slot.offset : cursor], slot, listed)
    _update(digest, data[cursor:], stopped)
    return digest.hexdigest()


def digests_of(folder: Directory, files: Iterable[str], undos: Sequence[Delta] = ()) -> dict[str, str]:
    """File -> its digest, as `digest_of`, several at a time."""
    names = list(files)
    return dict(zip(names, map_in_threads(lambda name: digest_of(folder, name, undos), names), strict=True))


@contextmanager
def digests_meanwhile(folder: Directory, files: Iterable[str]) -> Iterator[Callable[[], dict[str, str]]]:
    """Computes digests on threads of their own within the block; the context's function waits for them."""
    stopped, names = Event(), list(files)
    jobs = [Job(partial(_digests, folder, names[i::THREADS], stopped)) for i in range(min(THREADS, len(names)))]

    def wait() -> dict[str, str]:
        found = {file: digest for job in jobs for file, digest in job.result().items()}
        return {name: found[name] for name in names}

    def end() -> None:
        for job in jobs:
            job.give_up()

    try:
        for job in jobs:
            job.start()
        yield wait
    finally:
        stopped.set()
        uninterrupted(end)


def _digests(folder: Directory, files: Iterable[str], stopped: Event) -> dict[str, str]:
    return {file: digest_of(folder, file, (), stopped) for file in files}


def model_files(checkpoint: Checkpoint) -> list[str]:
    """The weight files and their indexes, relative to the checkpoint's folder."""
    files = {shard.file for shard in checkpoint.shards}
    indexes = {index for folder in {file.parent for file in files} if (index := index_file(folder)) is not None}
    return sorted(file.relative_to(checkpoint.root).as_posix() for file in files | indexes)


def _update(digest: Any, data: np.ndarray[Any, Any], stopped: Event | None) -> None:
    for start in range(0, data.size, _WINDOW):
        if stopped is not None and stopped.is_set():
            return
        digest.update(data[start : start + _WINDOW])


def _update_without(digest: Any, data: np.ndarray[Any, Any], slot: Slot, listed: Sequence[StoredTensor]) -> None:
    """Hashes a tensor with the elements that undo deltas list put back."""
    bits = data.view(slot.dtype.bits)
    undos = [Cursor(tensor) for tensor in listed]
    for start in range(0, bits.size, _WINDOW):
        block = bits[start : start + _WINDOW].copy()
        for undo in undos:
            for positions, old in undo.until(start + block.size):
                block[positions - start] = old
        digest.update(block)
