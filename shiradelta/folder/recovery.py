"""Writing elements into weight files, and the way back: what an interrupted action needs to become whole again."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.folder import restructure
from shiradelta.folder.state import Applied, State, StateFolder
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.models.checkpoint import Checkpoint, Slot, open_checkpoint
from shiradelta.util.files import os_errors
from shiradelta.util.interrupts import interrupts_held_back

#: Called with (what, done, total) while work goes on.
Progress = Callable[[str, int, int], None]


def check_writable(checkpoint: Checkpoint) -> None:
    """Weights that other folders share (a hub's cache) are never written in place.  Raises TargetError."""
    real = checkpoint.root.resolve()
    for shard in checkpoint.shards:
        linked = shard.file.resolve() != real / shard.file.relative_to(checkpoint.root)
        if linked or shard.file.stat().st_nlink > 1:
            kind = "a link" if linked else "one of several hard links to the same data"
            raise TargetError(f"{shard.file}: is {kind}, so other folders would change too; give --out FOLDER")
        if not os.access(shard.file, os.W_OK):
            raise TargetError(f"{shard.file}: cannot be written; change its permissions, or give --out FOLDER")


def reserve_space(checkpoint: Checkpoint) -> None:
    """Fills the holes of sparse files: a full disk would otherwise show as a fatal signal in the middle of a patch."""
    for shard in checkpoint.shards:
        status = shard.file.stat()
        if hasattr(os, "posix_fallocate") and status.st_blocks * 512 < status.st_size:
            with os_errors(shard.file), open(shard.file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, status.st_size)


def patch(edits: Iterable[tuple[Slot, StoredTensor]], strength: float, total: int, progress: Progress | None) -> None:
    """Writes the new elements into the files and makes them durable."""
    with ExitStack() as stack:
        maps: dict[Path, mmap.mmap] = {}
        for number, (slot, tensor) in enumerate(edits):
            if progress:
                progress("patching", number, total)
            if slot.file not in maps:
                stream = stack.enter_context(open(slot.file, "r+b"))
                maps[slot.file] = mmap.mmap(stream.fileno(), 0)
            data = np.frombuffer(maps[slot.file], np.uint8)
            weight = data[slot.offset : slot.offset + slot.nbytes].view(slot.dtype.bits)
            tensor.patch(weight, slot.dtype.name, strength)
        if progress:
            progress("syncing", total, total)
        for mapped in maps.values():
            mapped.flush()


def overlaid(view: Array, positions: Positions, undo: TensorDelta | None) -> Array:
    """`view`, elements at `positions`, with the undo's elements where it has some."""
    if undo is None or not undo.nnz:
        return view
    at = undo.positions()
    slot = np.minimum(np.searchsorted(at, positions), at.size - 1)
    return np.where(at[slot] == positions, undo.bits()[slot], view)


def recover(folder: StateFolder) -> Applied | None:
    """Rolls an interrupted action back; returns what it was about."""
    pending = folder.state.pending
    if pending is not None:
        undo(folder, pending, None)
    elif folder.state.applied:
        folder.tidy()
    return pending


def undo(folder: StateFolder, entry: Applied, progress: Progress | None) -> None:
    """Puts the originals of the pending `entry` back; may be repeated any number of times.

    Ctrl-C waits until that is done: half of it would be neither one state nor the other.

    Raises:
        TargetError: a file cannot be written, or is not the one that was patched.
    """
    again = "cannot be restored; run `shiradelta revert` again when it can"
    with interrupts_held_back(), os_errors(folder.root, again):
        restructure.swap_out(folder.root, folder.originals(entry), entry.replaced)
        checkpoint = open_checkpoint(folder.root)
        check_writable(checkpoint)
        with open_delta(folder.undo_file(entry)) as originals:
            for name, tensor in originals.items():
                check_same_tensor(checkpoint, name, tensor)
            edits = ((checkpoint[name], tensor) for name, tensor in originals.items())
            patch(edits, 1.0, len(originals), progress)
        folder.save(State(folder.state.applied))
        folder.tidy()


def check_same_tensor(checkpoint: Checkpoint, name: str, tensor: TensorDelta) -> None:
    """Raises TargetError where an undo's tensor is gone from the files, or another."""
    slot = checkpoint.get(name)
    if slot is None or slot.shape != tensor.shape or slot.dtype.name != tensor.dtype:
        found = "gone" if slot is None else f"{slot.dtype.name} {list(slot.shape)} now"
        raise TargetError(
            f"{checkpoint.root}: tensor {name!r} was patched and is {found}; restore the files from their source"
            " and delete its .shiradelta folder"
        )
