"""Writes elements into weight files, and rolls interrupted actions back."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.folder import restructure
from shiradelta.folder.journal import Applied, FolderState, Journal
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import difference
from shiradelta.models.safetensors import Slot
from shiradelta.util.arrays import overlay_values
from shiradelta.util.files import os_errors
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress


def check_writable(checkpoint: Checkpoint) -> None:
    """Checks that the weights can be written in place: other folders do not share them, as in a hub's cache.

    Raises:
        TargetError: a file is shared or read-only.
    """
    real = checkpoint.root.resolve()
    for shard in checkpoint.shards:
        linked = shard.file.resolve() != real / shard.file.relative_to(checkpoint.root)
        if linked or shard.file.stat().st_nlink > 1:
            kind = "a link" if linked else "one of several hard links to the same data"
            raise TargetError(f"{shard.file}: is {kind}, so other folders would change too; give --out FOLDER")
        if not os.access(shard.file, os.W_OK):
            raise TargetError(f"{shard.file}: cannot be written; change its permissions, or give --out FOLDER")


def reserve_space(checkpoint: Checkpoint) -> None:
    """Fills the holes of sparse files, since a full disk would raise a fatal signal in the middle of a patch."""
    for shard in checkpoint.shards:
        status = shard.file.stat()
        if hasattr(os, "posix_fallocate") and status.st_blocks * 512 < status.st_size:
            with os_errors(shard.file), open(shard.file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, status.st_size)


def patch(edits: Iterable[tuple[Slot, StoredTensor]], strength: float, total: int, progress: Progress | None) -> None:
    """Writes the new elements into the files and syncs them to disk."""
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


def without(view: Array, positions: Positions, undo: TensorDelta | None) -> Array:
    """The elements `view` at `positions` as they were before an action.

    Args:
        view: the elements after the action.
        positions: of the elements; increasing.
        undo: the action's undo delta for the tensor; None if the action left the tensor alone.
    """
    if undo is None or not undo.nnz:
        return view
    before: Array = overlay_values(np, view, positions, undo.positions(), undo.bits())
    return before


def recover(journal: Journal) -> Applied | None:
    """Rolls back an interrupted action, if there is one, and returns its delta."""
    pending = journal.state.pending
    if pending is not None:
        undo(journal, pending, None)
    elif journal.state.applied:
        journal.tidy()
    return pending


def undo(journal: Journal, entry: Applied, progress: Progress | None) -> None:
    """Restores the originals of the pending `entry`.  An interrupted undo can be repeated.

    Ctrl-C is held back until it is done.

    Raises:
        TargetError: a file cannot be written, or is not the one that was patched.
    """
    again = "cannot be restored; run `shiradelta revert` again when it can"
    with interrupts_held_back(), os_errors(journal.root, again):
        restructure.swap_out(journal.root, journal.originals(entry), entry.replaced)
        checkpoint = open_checkpoint(journal.root)
        check_writable(checkpoint)
        with open_delta(journal.undo_file(entry)) as originals:
            for name, tensor in originals.items():
                check_same_tensor(checkpoint, name, tensor)
            edits = ((checkpoint[name], tensor) for name, tensor in originals.items())
            patch(edits, 1.0, len(originals), progress)
        journal.save(FolderState(journal.state.applied))
        journal.tidy()


def check_same_tensor(checkpoint: Checkpoint, name: str, tensor: TensorDelta) -> None:
    """Checks that the files still have the tensor that an undo delta was made for.

    Raises:
        TargetError: the tensor is gone, or has another shape or dtype.
    """
    slot = checkpoint.get(name)
    if difference(tensor, slot) is not None:
        found = "gone" if slot is None else f"{slot.dtype.name} {list(slot.shape)} now"
        raise TargetError(
            f"{checkpoint.root}: tensor {name!r} was patched and is {found}; restore the files from their source"
            " and delete its .shiradelta folder"
        )
