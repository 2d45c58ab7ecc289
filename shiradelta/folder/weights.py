"""A model's weight files, opened to be written in place."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import difference
from shiradelta.models.safetensors import Slot, read_shard
from shiradelta.util.directory import Directory
from shiradelta.util.files import close_synced, os_errors
from shiradelta.util.progress import Progress


def check_writable(folder: Directory, files: Iterable[str]) -> None:
    """Checks that weight files can be written in place: other folders do not share them, as in a hub's cache.

    Args:
        folder: the model's folder.
        files: the files, relative to it.

    Raises:
        TargetError: a file is shared, read-only, or no regular file.
    """
    for file in files:
        inside = folder
        *above, name = file.split("/")
        for each in above:
            folder_status = inside.status(each)
            if folder_status is not None and stat.S_ISLNK(folder_status.st_mode):
                raise TargetError(
                    f"{inside.path / each}: is a link, so another folder would change; put a copy of it in its place"
                )
            inside = inside.folder(each)
        status = inside.status(name)
        _check_shared(inside.path / name, status)
        if status is not None and not os.access(inside.path / name, os.W_OK):
            raise TargetError(f"{inside.path / name}: cannot be written; change its permissions, or give --out FOLDER")


def _check_shared(path: Path, status: os.stat_result | None) -> None:
    if status is None:
        raise TargetError(f"{path}: is gone; another program has changed the folder, try again when it is done")
    linked = stat.S_ISLNK(status.st_mode)
    if linked or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
        kind = "a link" if linked else "one of several hard links to the same data"
        raise TargetError(f"{path}: is {kind}, so other folders would change too; give --out FOLDER")


def checkpoint_for(root: Path, delta: Delta) -> Checkpoint:
    """A folder's weights.  They may be packed (GPTQ and others) where a delta adds nothing: it changes bits then.

    Raises:
        SourceError: they are packed, and the delta adds to weights; and as `open_checkpoint`.
    """
    return open_checkpoint(root, packed=not any(tensor.operation.adds for tensor in delta.values()))


def slots_of(root: Path, files: Iterable[str]) -> dict[str, Slot]:
    """The tensors of some of a model's files, by the names that they have in its checkpoint."""
    return {
        (f"{component}/{slot.name}" if component else slot.name): slot
        for file in files
        for component in [file.rpartition("/")[0]]
        for slot in read_shard(root / file).slots
    }


def relative_files(checkpoint: Checkpoint) -> list[str]:
    """The weight files, relative to the checkpoint's folder."""
    return [shard.file.relative_to(checkpoint.root).as_posix() for shard in checkpoint.shards]


class WeightFiles:
    """Weight files held open for writing, as a context.

    They are opened before they are looked at, and no link is followed, so what is patched is what was checked.
    """

    def __init__(self, folder: Directory, files: Iterable[str]) -> None:
        self._files = tuple(files)
        check_writable(folder, self._files)
        self._folder = folder
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        try:
            for file in self._files:
                home, name = folder.home(file)
                descriptor = home.open_file(name, os.O_RDWR)
                self._descriptors[home.path / name] = descriptor
                if os.fstat(descriptor).st_nlink > 1:
                    _check_shared(home.path / name, os.fstat(descriptor))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, files: Iterable[str] | None = None) -> None:
        """Closes some files, or all: Windows replaces no file that is open."""
        chosen = set(self._descriptors) if files is None else {self._folder.path / file for file in files}
        for path in chosen & set(self._descriptors):
            close_synced(self._descriptors.pop(path))

    def check(self) -> None:
        """Checks that the names still stand for these files.

        Raises:
            TargetError: another program has put something else in the place of one.
        """
        for file in self._files:
            home, name = self._folder.home(file)
            descriptor, status = self._descriptors[home.path / name], home.status(name)
            if status is None or not os.path.samestat(os.fstat(descriptor), status):
                raise TargetError(f"{home.path / name}: was replaced meanwhile; try again when nothing else changes it")

    def reserve_space(self) -> None:
        """Fills the holes of sparse files, since a full disk would raise a fatal signal in the middle of a patch."""
        for path, descriptor in self._descriptors.items():
            status = os.fstat(descriptor)
            sparse = hasattr(os, "posix_fallocate") and status.st_blocks * 512 < status.st_size
            if sparse:
                with os_errors(path):
                    os.posix_fallocate(descriptor, 0, status.st_size)

    def map(self, paths: Iterable[Path]) -> None:
        """Maps files that are to be patched, so that a lack of memory shows before the first write.

        Raises:
            OSError: one cannot be mapped.
        """
        for path in paths:
            if path not in self._maps:
                self._maps[path] = mmap.mmap(self._descriptors[path], 0)

    def patch(
        self, edits: Iterable[tuple[Slot, StoredTensor]], strength: float, total: int, progress: Progress | None
    ) -> None:
        """Writes the new elements into the files and syncs them to disk."""
        for number, (slot, tensor) in enumerate(edits):
            if progress:
                progress("patching", number, total)
            self.map([slot.file])
            data = np.frombuffer(self._maps[slot.file], np.uint8)
            weight = data[slot.offset : slot.offset + slot.nbytes].view(slot.dtype.bits)
            tensor.patch(weight, slot.dtype.name, strength)
        if progress:
            progress("syncing", total, total)
        for file, mapped in self._maps.items():
            mapped.flush()
            os.fsync(self._descriptors[file])


def check_same_tensor(root: Path, slot: Slot | None, name: str, tensor: TensorDelta) -> None:
    """Checks that the files still have the tensor that an undo delta was made for.

    Raises:
        TargetError: the tensor is gone, or has another shape or dtype.
    """
    if difference(tensor, slot) is not None:
        found = "gone" if slot is None else f"{slot.dtype.name} {list(slot.shape)} now"
        raise TargetError(
            f"{root}: tensor {name!r} was patched and is {found}; restore the files from their source and delete its"
            " .shiradelta folder"
        )
