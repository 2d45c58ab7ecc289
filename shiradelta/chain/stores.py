"""Stores: where the files of a chain are, under paths such as `steps/000001-000002-0123456789abcdef.shd`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from shiradelta.chain.conditions import swap_by_reading
from shiradelta.chain.digests import check_file
from shiradelta.chain.rows import KINDS
from shiradelta.errors import ChainError, TargetError
from shiradelta.util.files import close_synced, os_errors, replacing, sync_directory
from shiradelta.util.locks import try_lock_if_possible
from shiradelta.util.regular_file import open_regular

_LOCK = "lock"


class Store(Protocol):
    """A place for files.  Whoever writes one replaces it atomically.

    Attributes:
        name: what to call it in messages.
    """

    name: str

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a small file; one more than `most` where it has more.

        Raises:
            FileNotFoundError: there is none.
            OSError, ChainError: it cannot be read.
        """

    def fetched(self, path: str, size: int, sha256: str) -> Path:
        """A file of these bytes on this machine: the store's own, or a copy of it.

        Raises:
            ChainError: it is missing, is another file, or cannot be read.
        """

    def fresh(self) -> Store:
        """The same store, from which every path is read anew once, whatever is on this machine already."""

    def writing(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A context with a file to write, which is put in place, durably, if the block succeeds.

        Raises:
            TargetError: it cannot be written.
        """

    def swap(self, path: str, data: bytes, old: bytes | None) -> None:
        """Replaces a small file if it still has the bytes that were read, durably.

        Args:
            path: the file.
            data: what it has afterwards.
            old: what it has now; None if it is not there.

        Raises:
            ChainError: it has others, which stay, as far as the place can tell.
            TargetError: it cannot be written.
        """

    def remove(self, path: str) -> None:
        """Removes a file, if there is one."""

    def files(self) -> list[str]:
        """The paths of the files of anchors, pages and steps."""

    def locked(self) -> AbstractContextManager[None]:
        """A context in which no other process changes the chain, where the place can tell.

        Raises:
            ChainError: another process is changing it.
        """


class FolderStore:
    """A folder.

    Args:
        root: its path; it is made when something is written.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.name = os.fspath(root)

    def read(self, path: str, most: int) -> bytes:
        """As `Store.read`."""
        with open_regular(self.root / path) as stream:
            return stream.read(most + 1)

    def fetched(self, path: str, size: int, sha256: str) -> Path:
        """As `Store.fetched`."""
        found = self.root / path
        check_file(found, size, sha256, os.fspath(found))
        return found

    def fresh(self) -> FolderStore:
        """Itself: nothing of it is elsewhere."""
        return self

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """As `Store.writing`."""
        target = self.root / path
        with os_errors(target):
            _make_folder(target.parent)
        with replacing(target) as stream:
            yield stream

    def swap(self, path: str, data: bytes, old: bytes | None) -> None:
        """As `Store.swap`; the caller has the lock."""
        swap_by_reading(self, path, data, old)

    def remove(self, path: str) -> None:
        """As `Store.remove`; folders that are empty then go, too."""
        target = self.root / path
        with os_errors(target, "cannot be removed"):
            target.unlink(missing_ok=True)
            for folder in target.parents:
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()

    def files(self) -> list[str]:
        """As `Store.files`."""
        with os_errors(self.root, "cannot be read"):
            found = (path for kind in KINDS for path in (self.root / kind).rglob("*"))
            return sorted(path.relative_to(self.root).as_posix() for path in found if not path.is_dir())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """As `Store.locked`; a file system without locks has none."""
        with os_errors(self.root / _LOCK):
            _make_folder(self.root)
            descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if not try_lock_if_possible(descriptor):
                raise ChainError("busy", self.name)
            yield
        finally:
            close_synced(descriptor)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably."""
    missing = []
    for each in (folder, *folder.parents):
        if each.is_dir():
            break
        if each.exists():
            raise TargetError(f"{each}: is a file; name a folder that is new, or that holds the chain")
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)


def open_store(place: str | os.PathLike[str] | Store) -> Store:
    """The store at a path or a URL.  One that is open already is returned as it is.

    Raises:
        MissingDependencyError: it is a URL, and fsspec or what it needs for that URL is not installed.
        ArgumentError: fsspec does not know such URLs.
    """
    if not isinstance(place, str | os.PathLike):
        return place
    if "://" not in str(place):
        return FolderStore(place)
    from shiradelta.chain.remote import RemoteStore

    return RemoteStore(str(place))
