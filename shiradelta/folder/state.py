"""What has been applied to a model's folder: `.shiradelta/`, its lock, its journal and its undo deltas.

`state.json` is replaced atomically and is the journal too: an action is written to `pending` before the first
weight is touched, and taken out in the same replacement that makes it count.  So after a crash a folder is
either as before (no pending action), or names the undo delta that takes it there.
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
from shiradelta.models.checkpoint import read_json
from shiradelta.util.files import os_errors, replacing, sync_directory

FOLDER = ".shiradelta"


@dataclass(frozen=True)
class Applied:
    """One delta that was applied.

    `replaced` lists files that were rewritten as a whole, because tensors were added or taken away; their
    originals wait in `undo/<id>/`.
    """

    id: int
    file: str
    digest: str
    strength: float
    tensors: int
    nonzeros: int
    replaced: tuple[str, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)  # whole tensors -> fingerprints


@dataclass(frozen=True)
class State:
    """The deltas on a folder, the last one on top, and the action that was begun, if any."""

    applied: tuple[Applied, ...] = ()
    pending: Applied | None = None


@dataclass
class StateFolder:
    """A model folder's `.shiradelta/`."""

    root: Path
    state: State = field(default_factory=State)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / FOLDER

    def undo_file(self, applied: Applied) -> Path:
        """The delta that puts the originals back."""
        return self.path / "undo" / f"{applied.id:04}.shd"

    def originals(self, applied: Applied) -> Path:
        """Where the originals of replaced files wait."""
        return self.path / "undo" / f"{applied.id:04}"

    def load(self) -> None:
        """Reads state.json, if there is one."""
        path = self.path / "state.json"
        for link in (self.path, self.path / "undo", *(self.path / "undo").glob("*")):
            if link.is_symlink():
                raise TargetError(f"{link}: is a link, which this tool never makes; delete it")
        if not path.exists():
            self.state = State()
            return
        try:
            found = read_json(path)
            if found["version"] != 1:
                raise ValueError(f"version {found['version']}")
            pending = found["pending"]
            self.state = State(
                tuple(_applied(entry) for entry in found["applied"]),
                None if pending is None else _applied(pending),
            )
        except (SourceError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise TargetError(f"{path}: is damaged ({error}); restore the model's files from their source") from None

    def save(self, state: State) -> None:
        """Makes a state durable."""
        with os_errors(self.path):
            self.path.mkdir(exist_ok=True)
            with replacing(self.path / "state.json") as stream:
                stream.write(json.dumps({"version": 1, **asdict(state)}, indent=1).encode())
        self.state = state

    def tidy(self) -> None:
        """Takes away what no state needs: undo deltas of actions that never began, or are over."""
        kept = self.state.applied + ((self.state.pending,) if self.state.pending else ())
        if not kept:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        needed = {self.undo_file(applied) for applied in kept} | {self.originals(applied) for applied in kept}
        for path in (*(self.path / "undo").glob("*"), *(self.path / "undo").glob(".*"), *self.path.glob(".*.tmp")):
            if path not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _applied(entry: dict[str, Any]) -> Applied:
    """One entry of state.json, which may have come with the folder from anywhere.  Raises ValueError and its like."""
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
def locked(root: Path) -> Iterator[StateFolder]:
    """The state of a folder, which no other process changes meanwhile.

    Raises:
        TargetError: another process holds it, or it cannot be written.
    """
    folder = StateFolder(root)
    with os_errors(folder.path):
        folder.path.mkdir(exist_ok=True)
        sync_directory(root)
        lock = FileLock(folder.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise TargetError(f"{root}: another process is changing this folder; try again when it is done") from None
    try:
        folder.load()
        try:
            yield folder
        finally:
            folder.tidy()
    finally:
        lock.release()
