"""Records what a command does to a folder, and makes what a power cut may leave of it.

POSIX promises nothing about what is not synced: each change of a folder may have come to the disk or not, in any order,
and each block of a file may be any of those that were written since the file was synced.  A rename within one folder is
one change; one between two folders is two.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Blocks of a file come to the disk in any order.
_BLOCK = 512


@dataclass
class _File:
    """A file's contents, the ones that the disk is sure to have in front."""

    versions: list[bytes] = field(default_factory=lambda: [b""])


@dataclass
class _Folder:
    """A folder's durable entries and the changes since; an entry is a file, or a folder by its path."""

    durable: dict[str, Any] = field(default_factory=dict)
    changes: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)

    def now(self) -> dict[str, Any]:
        """The entries as a process sees them."""
        return _after(self.durable, self.changes)


def _after(entries: dict[str, Any], changes: list[Callable[[dict[str, Any]], None]]) -> dict[str, Any]:
    found = dict(entries)
    for change in changes:
        change(found)
    return found


class Disk:
    """The disk under a folder, from which power can be cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Path, _Folder] = {}
        for path in (root, *sorted(root.rglob("*"))):
            if path.is_dir():
                self.folders[path] = _Folder()
            entry = path if path.is_dir() else _File([path.read_bytes()])
            if path != root:
                self.folders[path.parent].durable[path.name] = entry
        self.moments: list[Callable[[Path, random.Random], None]] = []

    def change(self, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """A change of a folder's entries."""
        if folder in self.folders:
            self.folders[folder].changes.append(change)

    def entry(self, path: Path) -> Any:
        """What a path names."""
        folder = self.folders.get(path.parent)
        return None if folder is None else folder.now().get(path.name)

    def look(self) -> None:
        """Notices what was written, and remembers the moment."""
        for path, folder in self.folders.items():
            for name, entry in folder.now().items():
                if isinstance(entry, _File) and (path / name).is_file():
                    data = (path / name).read_bytes()
                    if data != entry.versions[-1]:
                        entry.versions.append(data)
        self.moments.append(self._cut())

    def sync(self, path: Path) -> None:
        """A file or folder is synced."""
        entry = self.entry(path)
        if isinstance(entry, _File):
            entry.versions[:] = entry.versions[-1:]
        elif path in self.folders:
            folder = self.folders[path]
            folder.durable, folder.changes = folder.now(), []

    def _cut(self) -> Callable[[Path, random.Random], None]:
        """Makes a function that writes what may be left if the power is cut now."""
        folders = {path: (dict(folder.durable), list(folder.changes)) for path, folder in self.folders.items()}
        files = {id(entry): list(entry.versions) for entry in self._files()}

        def write(target: Path, chance: random.Random) -> None:
            kept = chance.choice([0.0, 0.5, 1.0])  # nothing, something, everything that was not synced
            chosen: dict[int, bytes] = {}

            def fill(path: Path, into: Path) -> None:
                into.mkdir()
                durable, changes = folders[path]
                for name, entry in _after(durable, [each for each in changes if chance.random() < kept]).items():
                    if isinstance(entry, Path):
                        fill(entry, into / name)
                    else:
                        if id(entry) not in chosen:
                            chosen[id(entry)] = _mixed(files[id(entry)], kept, chance)
                        (into / name).write_bytes(chosen[id(entry)])

            fill(self.root, target)

        return write

    def _files(self) -> Iterator[_File]:
        for folder in self.folders.values():
            for entries in (folder.durable, folder.now()):
                yield from (entry for entry in entries.values() if isinstance(entry, _File))
            for count in range(len(folder.changes)):
                entries = _after(folder.durable, folder.changes[: count + 1])
                yield from (entry for entry in entries.values() if isinstance(entry, _File))


def _mixed(versions: list[bytes], kept: float, chance: random.Random) -> bytes:
    """Contents of which each block is one of those since the last sync."""
    if kept in (0.0, 1.0):
        return versions[0 if kept == 0.0 else -1]
    length = len(chance.choice(versions))
    blocks = []
    for start in range(0, length, _BLOCK):
        block = chance.choice(versions)[start : min(start + _BLOCK, length)]
        blocks.append(block.ljust(min(_BLOCK, length - start), b"\0"))
    return b"".join(blocks)


@contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Records all changes of a folder within the block."""
    disk = Disk(root)

    def path_of(name: Any, descriptor: int | None) -> Path:
        if isinstance(name, int):
            return Path(os.readlink(f"/proc/self/fd/{name}"))
        return Path(name) if descriptor is None else Path(os.readlink(f"/proc/self/fd/{descriptor}"), name)

    def added(real: Callable[..., Any], *args: Any, dir_fd: int | None = None, **options: Any) -> Any:
        path = path_of(args[0], dir_fd)
        made = real is not real_open or bool(args[1] & os.O_CREAT)
        before = disk.entry(path)
        result = real(*args, dir_fd=dir_fd, **options)
        if made and before is None and path.parent in disk.folders:
            if real is not real_open:
                disk.folders.setdefault(path, _Folder())
            entry = _File() if real is real_open else path
            disk.change(path.parent, lambda entries: entries.update({path.name: entry}))
            disk.look()
        return result

    def removed(real: Callable[..., Any], *args: Any, dir_fd: int | None = None, **options: Any) -> Any:
        path = path_of(args[0], dir_fd)
        disk.look()
        result = real(*args, dir_fd=dir_fd, **options)
        disk.change(path.parent, lambda entries: entries.pop(path.name, None))
        disk.look()
        return result

    def moved(real: Callable[..., Any], source: Any, target: Any, **options: Any) -> Any:
        old, new = path_of(source, options.get("src_dir_fd")), path_of(target, options.get("dst_dir_fd"))
        disk.look()
        entry = disk.entry(old)
        result = real(source, target, **options)

        def rename(entries: dict[str, Any]) -> None:
            entries[new.name] = entry
            if real is not real_link:
                entries.pop(old.name, None)

        if old.parent == new.parent:
            disk.change(old.parent, rename)
        else:
            disk.change(new.parent, lambda entries: entries.update({new.name: entry}))
            if real is not real_link:
                disk.change(old.parent, lambda entries: entries.pop(old.name, None))
        disk.look()
        return result

    def synced(real: Callable[..., Any], descriptor: int) -> None:
        disk.look()
        real(descriptor)
        disk.sync(path_of(descriptor, None))
        disk.look()

    real_open, real_link = os.open, os.link
    wrappers = {
        "open": added,
        "mkdir": added,
        "unlink": removed,
        "rmdir": removed,
        "replace": moved,
        "link": moved,
        "fsync": synced,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, wrapper in wrappers.items():
            real = getattr(os, name)
            patch.setattr(os, name, lambda *args, _r=real, _w=wrapper, **options: _w(_r, *args, **options))
        yield disk
