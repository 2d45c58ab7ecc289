"""Files on their way into a store and out of it, with their digests checked."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from shiradelta.chain.manifest import FILE_NAME, StoredFile
from shiradelta.chain.stores import Store
from shiradelta.errors import ChainError, TargetError
from shiradelta.folder.copying import FollowedLinks
from shiradelta.folder.weights import relative_files
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.files import os_errors

_CHUNK = 1 << 20


def digest_of_file(path: Path) -> tuple[int, str]:
    """(size, SHA-256) of a file."""
    with open(path, "rb") as stream:
        return _copied(stream, None)


def put(store: Store, path: str, source: Path, size: int, sha256: str) -> None:
    """Copies a file into a store.

    Raises:
        TargetError: it cannot be written, or is not the file that was looked at before.
    """
    with open(source, "rb") as stream, store.writing(path) as target:
        if _copied(stream, target) != (size, sha256):
            raise TargetError(f"{source}: was changed meanwhile; try again when nothing else writes it")


def fetched(store: Store, path: str, size: int, sha256: str) -> Path:
    """The path of a file of a store on this machine, checked.

    Raises:
        ChainError: it is missing, or is another file.
    """
    local = store.local(path)
    if local is None:
        raise ChainError("missing_file", f"{store.name}/{path}")
    try:
        found = digest_of_file(local)
    except FileNotFoundError:
        raise ChainError("missing_file", os.fspath(local)) from None
    if found != (size, sha256):
        raise ChainError("wrong_bytes", os.fspath(local), f"{found[0]:,} bytes, SHA-256 {found[1][:16]}...")
    return local


def files_of_model(checkpoint: Checkpoint) -> list[StoredFile]:
    """The files of a model's folder that belong into an anchor: all but hidden ones.

    Raises:
        TargetError: a link, a device, or a name that an anchor cannot hold.
    """
    root = checkpoint.root
    links = FollowedLinks(root, set(relative_files(checkpoint)))
    found = []
    with os_errors(root, "cannot be read"):
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for path in (Path(folder, name) for name in [*linked, *names] if not name.startswith(".")):
                name = path.relative_to(root).as_posix()
                links.check(name, path, os.lstat(path))
                if not FILE_NAME.fullmatch(name) or not stat.S_ISREG(os.stat(path).st_mode):
                    raise TargetError(f"{path}: an anchor cannot hold a file of this name; rename or move it")
                found.append(StoredFile(name, *digest_of_file(path)))
    return sorted(found, key=lambda file: file.name)


def _copied(source: BinaryIO, target: BinaryIO | None) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return size, digest.hexdigest()
