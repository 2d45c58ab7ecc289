"""The journal of a model's folder: which deltas are applied, in `.shiradelta/`, with its lock and its undo deltas.

`state.json` is replaced atomically.  An action is written to `pending` before the first weight changes, and moved to
`applied` when the last one has.  So after a crash a folder is either as before (nothing pending), or the journal names
the undo delta that restores it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from shiradelta.errors import SourceError, TargetError
from shiradelta.util.files import os_errors, replacing, sync_directory
from shiradelta.util.json_files import read_json

FOLDER = ".shiradelta"


@dataclass(frozen=True)
class Applied:
    """A delta that is applied to a folder.

    Attributes:
        id: number of the action, which names its undo delta.
        file: name of the delta's file.
        digest: the delta's content digest.
        strength: alpha.
        tensors: number of tensors in the delta.
        nonzeros: number of nonzeros in the delta.
        replaced: files that were rewritten because tensors were added or removed; the originals are in `undo/<id>/`.
        added: names of added tensors -> their fingerprints.
    """

    id: int
    file: str
    digest: str
    strength: float
    tensors: int
    nonzeros: int
    replaced: tuple[str, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FolderState:
    """The deltas on a folder, the last one on top, and the unfinished action, if any."""

    applied: tuple[Applied, ...] = ()
    pending: Applied | None = None


@dataclass
class Journal:
    """The `.shiradelta/` of a model's folder."""

    root: Path
    state: FolderState = field(default_factory=FolderState)

    @property
    def path(self) -> Path:
        """The `.shiradelta/` folder."""
        return self.root / FOLDER

    def undo_file(self, applied: Applied) -> Path:
        """The file of the delta that restores the original elements."""
        return self.path / "undo" / f"{applied.id:04}.shd"

    def originals(self, applied: Applied) -> Path:
        """The folder that keeps the originals of replaced files."""
        return self.path / "undo" / f"{applied.id:04}"

    def load(self) -> None:
        """Reads state.json, if there is one.

        Raises:
            TargetError: it is damaged, or there is a link.
        """
        path = self.path / "state.json"
        for link in (self.path, self.path / "undo", *(self.path / "undo").glob("*")):
            if link.is_symlink():
                raise TargetError(f"{link}: is a link, which this tool never makes; delete it")
        if not path.exists():
            self.state = FolderState()
            return
        try:
            found = read_json(path)
            if found["version"] != 1:
                raise ValueError(f"version {found['version']}")
            pending = found["pending"]
            self.state = FolderState(
                tuple(_applied(entry) for entry in found["applied"]),
                None if pending is None else _applied(pending),
            )
        except (SourceError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise TargetError(f"{path}: is damaged ({error}); restore the model's files from their source") from None

    def save(self, state: FolderState) -> None:
        """Writes a state and syncs it to disk."""
        with os_errors(self.path):
            self.path.mkdir(exist_ok=True)
            with replacing(self.path / "state.json") as stream:
                stream.write(json.dumps({"version": 1, **asdict(state)}, indent=1).encode())
        self.state = state

    def tidy(self) -> None:
        """Deletes undo deltas and originals that the state does not need."""
        kept = self.state.applied + ((self.state.pending,) if self.state.pending else ())
        if not kept:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        needed = {self.undo_file(applied) for applied in kept} | {self.originals(applied) for applied in kept}
        for path in (*(self.path / "undo").glob("*"), *(self.path / "undo").glob(".*"), *self.path.glob(".*.tmp")):
            if path not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _applied(entry: dict[str, Any]) -> Applied:
    """Parses a delta of state.json, which is untrusted: the folder may come from anywhere.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is malformed.
    """
    found = Applied(**{**entry, "replaced": tuple(entry["replaced"]), "added": dict(entry["added"])})
    numbers = (found.id, found.tensors, found.nonzeros, *found.added.values())
    texts = (found.file, found.digest, *found.replaced, *found.added)
    if not all(type(n) is int and n >= 0 for n in numbers) or not all(type(text) is str for text in texts):
        raise ValueError("an entry of another type")
    if not isinstance(found.strength, (int, float)):
        raise ValueError("a strength that is no number")
    for name in found.replaced:
        path = PurePosixPath(name)
        inside = not path.is_absolute() and not {"..", FOLDER} & set(path.parts) and "\\" not in name
        if not inside or not name.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{name!r} is no weight file of this folder")
    return found


@contextmanager
def locked(root: Path) -> Iterator[Journal]:
    """Locks a folder against other processes within the block, and reads its journal.

    Raises:
        TargetError: another process has locked the folder, or it cannot be written.
    """
    journal = Journal(root)
    with os_errors(journal.path):
        journal.path.mkdir(exist_ok=True)
        sync_directory(root)
        lock = FileLock(journal.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise TargetError(f"{root}: another process is changing this folder; try again when it is done") from None
    try:
        journal.load()
        try:
            yield journal
        finally:
            journal.tidy()
    finally:
        lock.release()
