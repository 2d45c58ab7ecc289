"""The journal of a model's folder: which deltas are applied, in `.shiradelta/`, with its lock and its undo deltas.

`state.json` is replaced atomically.  An action is written to `pending` before the first weight changes, and moved to
`applied` when the last one has.  So after a crash a folder is either as before (nothing pending), or the journal names
the undo delta that restores it.

`.shiradelta/` and the lock in it are never removed: a process that waits for a removed lock would hold another one than
the next process.  Undo deltas are removed only when a state that does not name them is durable.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.folder.state import Applied, FolderState, parse_state
from shiradelta.io.reader import Delta, open_delta
from shiradelta.util.directory import Directory
from shiradelta.util.files import close_synced, os_errors
from shiradelta.util.locks import NO_LOCKS, try_lock
from shiradelta.util.mapping import map_file

FOLDER = ".shiradelta"
LOCK = "lock"
_STATE = "state.json"
_UNDO = "undo"
_LARGEST_STATE = 64 << 20
#: An undo delta, or a folder of originals.
_UNDO_NAME = re.compile(r"[0-9]{4,10}(?:\.shd)?")


@dataclass
class Journal:
    """The `.shiradelta/` of a model's folder.

    Attributes:
        folder: the model's folder.
        own: the `.shiradelta/` in it.
        state: what was read or written last.
    """

    folder: Directory
    own: Directory
    state: FolderState = field(default_factory=FolderState)
    _durable: bool = False

    @property
    def root(self) -> Path:
        """The path of the model's folder."""
        return self.folder.path

    def undo_path(self, applied: Applied) -> Path:
        """The file of the delta that restores the original elements."""
        return self.own.path / _UNDO / undo_name(applied)

    def undo_folder(self) -> Directory:
        """The folder of undo deltas, made if there is none."""
        return self.own.make_folder(_UNDO)

    def originals(self, applied: Applied) -> Directory | None:
        """The folder that keeps the originals of rewritten files, if there is one."""
        undo = self._undo_folder()
        name = originals_name(applied)
        return None if undo is None or undo.status(name) is None else undo.folder(name)

    def open_undo(self, applied: Applied) -> Delta:
        """Opens an undo delta.

        Raises:
            TargetError: it is missing, or is not the one that was written.
            FormatError: it is damaged.
        """
        path = self.undo_path(applied)
        undo = self._undo_folder()
        if undo is None or undo.status(path.name) is None:
            raise TargetError(f"{path}: is missing; restore the model's files from their source")
        raw = _contents(undo, path.name)
        if applied.undo and hashlib.sha256(raw).hexdigest() != applied.undo:
            raise TargetError(
                f"{path}: is not the undo delta that was written for {applied.file}; restore the model's files from"
                " their source"
            )
        return _open(raw, path)

    def unrecorded(self) -> list[str]:
        """The undo deltas and the folders of originals where there is no state.json; nothing where there is one."""
        undo = self._undo_folder()
        if undo is None or self.own.status(_STATE) is not None:
            return []
        return [name for name in undo.names() if _UNDO_NAME.fullmatch(name)]

    def open_unrecorded(self, name: str) -> Delta:
        """Opens an undo delta that no state.json names.

        Raises:
            FormatError: it is damaged.
        """
        undo = self.undo_folder()
        return _open(_contents(undo, name), undo.path / name)

    def load(self) -> None:
        """Reads state.json, if there is one.

        Raises:
            TargetError: it is damaged, or there is a link.
        """
        self._durable = False
        undo = self._undo_folder()
        if undo is not None:
            for name in undo.names():
                status = undo.status(name)
                if status is not None and stat.S_ISLNK(status.st_mode):
                    raise TargetError(f"{undo.path / name}: is a link, which this tool never makes; delete it")
        raw = self.read()
        try:
            self.state = FolderState() if raw is None else parse_state(raw)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise TargetError(
                f"{self.own.path / _STATE}: is damaged ({error}); restore the model's files from their source"
            ) from None

    def read(self) -> bytes | None:
        """The bytes of state.json; None if there is none."""
        if self.own.status(_STATE) is None:
            return None
        with self.own.reading(_STATE) as stream:
            # So much memory is asked for, whatever the file has.
            return stream.read(min(os.fstat(stream.fileno()).st_size, _LARGEST_STATE))

    def save(self, state: FolderState) -> None:
        """Writes a state and syncs it to disk.

        Raises:
            OSError: it is not durable.  `load` tells what the disk has now: the state from before, or the new one.
        """
        self._durable = False
        with self.own.replacing(_STATE) as stream:
            stream.write(state.to_json())
        self.state, self._durable = state, True

    def forget(self) -> None:
        """Removes the state and what belongs to it, durably.

        Raises:
            OSError: it cannot be removed.
        """
        self.save(FolderState())
        self.tidy()
        undo = self._undo_folder()
        if undo is not None:
            if undo.names():  # some could not be removed; without a state they would tell of a delta
                return
            undo.sync()
        self.own.remove(_STATE)
        self.own.sync()

    def tidy(self) -> None:
        """Removes undo deltas and originals that the state does not need, and what a killed command has left.

        What cannot be removed stays for the next command.
        """
        kept = self.state.applied + ((self.state.pending,) if self.state.pending else ())
        needed = {name(entry) for entry in kept for name in (undo_name, originals_name)}
        with suppress(OSError):
            if not self._durable:  # it was read, and its writer may have failed to make it durable
                self.own.sync()
                self._durable = True
            for name in self.own.names():
                if name.startswith(".") and name.endswith(".tmp"):
                    self.own.remove(name)
            undo = self._undo_folder()
            for name in [] if undo is None else undo.names():
                if undo is not None and name not in needed:
                    undo.remove(name)

    def _undo_folder(self) -> Directory | None:
        return None if self.own.status(_UNDO) is None else self.own.folder(_UNDO)


def _contents(undo: Directory, name: str) -> mmap.mmap | bytes:
    """The bytes of a file in the folder of undo deltas."""
    with undo.reading(name) as stream:
        size = os.fstat(stream.fileno()).st_size
        return map_file(stream.fileno(), undo.path / name, size) if size else b""


def _open(raw: mmap.mmap | bytes, path: Path) -> Delta:
    delta = open_delta(np.frombuffer(raw, np.uint8))
    delta.file = os.fspath(path)
    return delta


def undo_name(applied: Applied) -> str:
    """The name of an action's undo delta."""
    return f"{applied.id:04}.shd"


def originals_name(applied: Applied) -> str:
    """The name of the folder of an action's originals."""
    return f"{applied.id:04}"


@contextmanager
def locked(root: Path, *, lock: bool = True) -> Iterator[Journal]:
    """Locks a folder against other processes within the block, and reads its journal.

    Args:
        root: the folder.
        lock: False does without, on a file system that cannot lock.

    Raises:
        TargetError: another process has locked the folder, it cannot be locked, or it cannot be written.
    """
    with ExitStack() as stack:
        with os_errors(root / FOLDER):
            folder = stack.enter_context(Directory(root))
            own = folder.make_folder(FOLDER)
            if lock:
                descriptor = own.open_file(LOCK, os.O_RDWR | os.O_CREAT)
                stack.callback(close_synced, descriptor)
                _take(folder, own, descriptor)
        journal = Journal(folder, own)
        with os_errors(own.path, "cannot be read"):
            journal.load()
        yield journal


def _take(folder: Directory, own: Directory, descriptor: int) -> None:
    """Takes the lock.  Somebody may have deleted its folder in between, and another process made a new one."""
    try:
        taken = try_lock(descriptor)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise TargetError(
            f"{own.path / LOCK}: this file system cannot lock files ({error.strerror}), so two processes could lose"
            " the way back; give --no-lock if no other process uses the folder"
        ) from error
    status = own.status(LOCK)
    same = status is not None and os.path.samestat(status, os.fstat(descriptor)) and own.is_this(folder.status(FOLDER))
    if not taken or not same:
        raise TargetError(f"{folder.path}: another process is using this folder; try again when it is done")


@contextmanager
def reading(root: Path) -> Iterator[Journal | None]:
    """Reads a folder's journal, None if there is none, and changes nothing; the folder may be read-only.

    Raises:
        TargetError: another process changes the folder.
    """
    busy = TargetError(f"{root}: another process is changing this folder; try again when it is done")
    with ExitStack() as stack:
        with os_errors(root / FOLDER, "cannot be read"):
            folder = stack.enter_context(Directory(root))
            journal = None if folder.status(FOLDER) is None else Journal(folder, folder.folder(FOLDER))
            if journal is not None:
                if journal.own.status(LOCK) is not None and not _share(journal.own, stack):
                    raise busy
                journal.load()
            before = None if journal is None else journal.read()
        yield journal
        with os_errors(root / FOLDER, "cannot be read"):
            if folder.status(FOLDER) is not None if journal is None else journal.read() != before:
                raise busy


def _share(own: Directory, stack: ExitStack) -> bool:
    """Takes the lock together with other readers; False if a writer has it.

    Where it cannot be read or locked, the caller looks whether the state has changed in the end.
    """
    try:
        descriptor = own.open_file(LOCK)
        stack.callback(close_synced, descriptor)
        return try_lock(descriptor, shared=True)
    except PermissionError:
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        raise
