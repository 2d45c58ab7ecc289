"""Copies a model's folder, to patch the copy instead of the original."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shiradelta.errors import FormatError, ShiraDeltaError, TargetError
from shiradelta.folder.journal import FOLDER, LOCK, reading
from shiradelta.folder.weights import relative_files
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.directory import Directory, copy_contents, what_is
from shiradelta.util.files import os_errors, sync_directory, temporary_name


@contextmanager
def copied(root: Path, out: Path) -> Iterator[Path]:
    """A context with a copy of a folder, which becomes `out` if the block succeeds and is deleted otherwise.

    The folder itself is only read.  It may come from anywhere, so links, devices and the like are refused by name.
    Links are followed where the weights are links, and in a hub's cache, which links to its own blobs.

    Raises:
        TargetError: `out` exists, lies inside the folder, or cannot be written; there is something that is not copied.
    """
    if out.resolve().is_relative_to(root.resolve()) and not _is_taken(out):
        raise TargetError(f"{out}: lies inside {root}; give a folder outside it")
    weights = set(relative_files(open_checkpoint(root, packed=True)))
    with new_folder(out, root) as copy:
        with reading(root), os_errors(out), Directory(root) as source, Directory(copy) as target:
            _copy(FollowedLinks(root, weights), source, target, "")
        yield copy


@contextmanager
def new_folder(out: Path, source: Path) -> Iterator[Path]:
    """A context with an empty folder, which becomes `out` if the block succeeds and is deleted otherwise.

    Args:
        out: the folder, which is new or empty.
        source: where what is written to it comes from, for messages.

    Raises:
        TargetError: `out` exists, or cannot be written.
    """
    if _is_taken(out):
        raise _taken(out)
    copy = out.with_name(temporary_name(out.name))
    try:
        with os_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            copy.mkdir()
        yield copy
        with os_errors(out):
            try:
                os.replace(copy, out)
            except OSError as error:
                if not _is_taken(out):
                    raise
                raise _taken(out, " by now, as another process has made it; wait for that one, or") from error
            sync_directory(out.parent)
    except BaseException as error:
        shutil.rmtree(copy, ignore_errors=True)
        if isinstance(error, ShiraDeltaError):
            # Where the system fails, `out` could not be written; what else is wrong is so in the user's folder.
            _rename(error, copy, out if isinstance(error.__cause__, OSError) else source)
        raise


def _taken(out: Path, since: str = " already;") -> TargetError:
    return TargetError(f"{out}: exists{since} give a new folder")


def _is_taken(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _rename(error: ShiraDeltaError, copy: Path, folder: Path) -> None:
    """Lets an error name a folder in place of its temporary copy, which is gone."""
    old, new = os.fspath(copy), os.fspath(folder)
    error.args = tuple(str(each).replace(old, new) for each in error.args)
    if isinstance(error, FormatError) and error.file is not None:
        error.file = error.file.replace(old, new)


class FollowedLinks:
    """Which links in a model's folder may be followed: those of its weight files, and a hub's cache to its own blobs.

    Args:
        root: the folder.
        weights: its weight files, relative to it.
    """

    def __init__(self, root: Path, weights: set[str]) -> None:
        self._weights = weights
        above = (folder.parent for folder in root.resolve().parents if folder.name == "snapshots")
        self._blobs = next((folder / "blobs" for folder in above), None)

    def check(self, file: str, path: Path, status: os.stat_result) -> None:
        """Checks that a file, or what a link leads to, may be copied.

        Args:
            file: its path, relative to the folder.
            path: its path.
            status: its own status, the link's where it is one.

        Raises:
            TargetError: it may not.
        """
        followed = file in self._weights or (self._blobs is not None and path.resolve().parent == self._blobs)
        if not (stat.S_ISREG(status.st_mode) or (stat.S_ISLNK(status.st_mode) and followed)):
            raise TargetError(f"{path}: {what_is(status)}, and is not copied; delete it, or put a file in its place")


def _copy(links: FollowedLinks, source: Directory, target: Directory, inside: str) -> None:
    """Copies everything in a folder, durably; `inside` is what stands before its names in the model's folder."""
    for name in source.names():
        status, path = source.status(name), source.path / name
        if status is None or (inside, name) == (f"{FOLDER}/", LOCK):
            continue
        if stat.S_ISDIR(status.st_mode):
            _copy(links, source.folder(name), target.make_folder(name), f"{inside}{name}/")
            continue
        links.check(inside + name, path, status)
        if stat.S_ISREG(status.st_mode):
            source.copy(name, target, name)
        else:
            _copy_linked(path, target, name)
    target.sync()


def _copy_linked(path: Path, target: Directory, name: str) -> None:
    """Copies the regular file that a link leads to."""
    with ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        stream = stack.enter_context(os.fdopen(descriptor, "rb"))
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise TargetError(f"{path}: leads to what {what_is(status)}, and is not copied; put a file in its place")
        copy_contents(stream, target, name)
