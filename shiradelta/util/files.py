"""Writing files so that nothing is ever half-written: a temporary beside the target, then a rename."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shiradelta.errors import TargetError

#: How errors end after which everything is as before.
NOTHING_CHANGED = "nothing was changed"


def sync_directory(path: Path) -> None:
    """Makes renames in a folder durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        close_synced(descriptor)


def close_synced(descriptor: int) -> None:
    """Closes a descriptor whose file is on the disk already, or was only read.

    An error then tells nothing, and the descriptor is closed all the same.
    """
    try:  # noqa: SIM105 - `suppress` takes as long as closing
        os.close(descriptor)
    except OSError:
        pass


@contextmanager
def os_errors(path: Path, what: str = "cannot be written", ending: str = NOTHING_CHANGED) -> Iterator[None]:
    """Turns the system's errors (no space, no permission, ...) into one plain line.

    Args:
        path: the file or folder that the block is about.
        what: what cannot be done with it.
        ending: what is so after an error, or what to do.
    """
    try:
        yield
    except OSError as error:
        raise system_error(error, path, what, ending) from error


@contextmanager
def temporary_errors() -> Iterator[None]:
    """`os_errors` of a block in which only the system's temporary folder is written."""
    remedy = "; free some space there, or set TMPDIR to another folder"
    with os_errors(Path(tempfile.gettempdir()), ending=NOTHING_CHANGED + remedy):
        yield


def system_error(
    error: OSError, path: Path, what: str = "cannot be written", ending: str = NOTHING_CHANGED
) -> TargetError:
    """The system's error as one plain line; the arguments are those of `os_errors`."""
    reason = error.strerror or str(error)
    named = isinstance(error.filename, str | bytes | os.PathLike)  # it may be a descriptor's number
    if named and not _is_temporary(str(error.filename), path):
        return TargetError(f"{final_name(str(error.filename))}: {reason}", ending=ending)
    return TargetError(f"{path}: {what} ({reason})", ending=ending)


def _is_temporary(name: str, path: Path) -> bool:
    """Whether a name is that of `path` or of its temporary file."""
    return Path(name).name == path.name or Path(name).name.startswith(f".{path.name}.")


def temporary_name(name: str) -> str:
    """What a file or folder is called until it is complete."""
    return f".{name}.{secrets.token_hex(8)}.tmp"


def final_name(name: str) -> str:
    """The name that a temporary file will have, with what stands before it; other names stay."""
    return re.sub(r"(^|[/\\])\.([^/\\]+)\.[0-9a-f]{16}\.tmp$", r"\1\2", name)


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
    temporary = path.with_name(temporary_name(path.name))
    with os_errors(path):
        try:  # around the opening, too: a signal may come right after it
            with open(temporary, "x+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            with suppress(FileNotFoundError):
                os.chmod(temporary, path.stat().st_mode & 0o777)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    with os_errors(path.parent, "cannot be synced to disk", f"{path} is written, but may not outlast a power cut"):
        sync_directory(path.parent)
