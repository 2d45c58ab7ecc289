"""Copies a model's folder, to patch the copy instead of the original."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from shiradelta.errors import TargetError
from shiradelta.folder.journal import FOLDER, locked
from shiradelta.folder.recovery import recover
from shiradelta.util.files import os_errors


@contextmanager
def copied(root: Path, out: Path) -> Iterator[Path]:
    """A context with a copy of a folder, which becomes `out` if the block succeeds and is deleted otherwise.

    Raises:
        TargetError: `out` exists, lies inside the folder, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"{out}: exists already; give a new folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise TargetError(f"{out}: lies inside {root}; give a folder outside it")
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        with os_errors(out), _at_rest(root):
            shutil.copytree(root, copy, dirs_exist_ok=True, ignore=_ignore_lock)
        for path in (copy, *copy.rglob("*")):  # a read-only file's copy must be writable
            path.chmod(path.stat().st_mode | stat.S_IWUSR | (stat.S_IXUSR if path.is_dir() else 0))
        yield copy
        with os_errors(out):
            os.replace(copy, out)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


@contextmanager
def _at_rest(root: Path) -> Iterator[None]:
    """Locks the folder against other processes within the block, if it can be locked."""
    state = root / FOLDER
    with locked(root) if state.exists() and os.access(state, os.W_OK) else nullcontext() as journal:
        if journal is not None:
            recover(journal)
        yield


def _ignore_lock(folder: str, names: list[str]) -> set[str]:
    return {"lock"} & set(names) if Path(folder).name == FOLDER else set()
