"""Writing files so that nothing is ever half-written: a temporary beside the target, then a rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shiradelta.errors import TargetError


def sync_directory(path: Path) -> None:
    """Makes renames in a folder durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def os_errors(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """Turns the system's errors (no space, no permission, ...) into one plain line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, shutil.Error):  # from copying: one (source, target, message) per file
            reason = str(error.args[0][0][2]).split(":")[0]
        elif error.filename is not None and not _is_temporary(str(error.filename), path):
            raise TargetError(f"{error.filename}: {reason}; nothing was changed") from error
        raise TargetError(f"{path}: {what} ({reason}); nothing was changed") from error


def _is_temporary(name: str, path: Path) -> bool:
    """Whether a name is that of `path` or of its temporary file."""
    return Path(name).name == path.name or Path(name).name.startswith(f".{path.name}.")


def check_target(path: Path, start: bytes, kind: str) -> None:
    """Checks, before long work, that a file can be written to `path` and replaces no file of another kind.

    Args:
        path: the file to write.
        start: what files of its kind begin with.
        kind: the kind of file, in words, such as "a PNG".

    Raises:
        TargetError: the folder does not exist or cannot be written to, or a file of another kind is there.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise TargetError(f"{path}: cannot be written (no such folder); make it first")
    with os_errors(path), tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=folder):
        pass
    if not path.exists():
        return
    if path.is_file():
        with os_errors(path, "cannot be read"), open(path, "rb") as stream:
            if stream.read(len(start)) in (start, b""):
                return
    raise TargetError(f"{path}: is there and is not {kind}, so it is not replaced; give another name")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` if the block succeeds and is deleted otherwise.

    Raises:
        TargetError: it cannot be written.
    """
    with os_errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with open(descriptor, "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, _mode(path))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        sync_directory(path.parent)


def _mode(path: Path) -> int:
    """The mode of the file to be replaced, or that of any new file (mkstemp's is private)."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
