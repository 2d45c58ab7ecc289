"""Files on their way into a store and out of it, with their digests checked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shiradelta.chain.digests import copied_with_digest, digest_of_file
from shiradelta.chain.manifest import check_tensor_name
from shiradelta.chain.rows import FILE_NAME, Anchor, StoredFile
from shiradelta.chain.state import State, state_digest, state_of
from shiradelta.chain.stores import FolderStore, Store
from shiradelta.errors import ChainError, TargetError
from shiradelta.folder.copying import FollowedLinks
from shiradelta.folder.weights import relative_files
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.util.directory import Directory, copy_contents
from shiradelta.util.files import os_errors


def put(store: Store, path: str, source: Path, size: int, sha256: str) -> None:
    """Copies a file into a store.

    Raises:
        TargetError: it cannot be written, or is not the file that was looked at before.
    """
    with open(source, "rb") as stream, store.writing(path) as target:
        if copied_with_digest(stream, target) != (size, sha256):
            raise TargetError(f"{source}: was changed meanwhile; try again when nothing else writes it")


def put_anchor(store: Store, version: int, checkpoint: Checkpoint) -> tuple[Anchor, State]:
    """Copies a model's files into a store; the state that they were read as, which the caller compares.

    Raises:
        TargetError: the store cannot be written, or an anchor cannot hold a file of the model.
    """
    state = state_of(checkpoint)
    for name in state:
        try:
            check_tensor_name(name)
        except ValueError as error:
            raise TargetError(f"{checkpoint.root}: {error}; rename it") from None
    anchor = Anchor(version, state_digest(state), tuple(files_of_model(checkpoint)))
    folder = checkpoint.root.parent if checkpoint.root.is_file() else checkpoint.root
    for file in anchor.files:
        put(store, anchor.path(file), folder / file.name, file.bytes, file.sha256)
    return anchor, state


def write_anchor(store: Store, anchor: Anchor, folder: Path) -> None:
    """Puts the files of an anchor, checked, into a new folder.

    Raises:
        ChainError: one is missing, or is another file; or together they are another model.
        TargetError: the folder cannot be written.
    """
    with os_errors(folder), Directory(folder) as root:
        for file in anchor.files:
            with open(store.fetched(anchor.path(file), file.bytes, file.sha256), "rb") as stream:
                *above, name = file.name.split("/")
                home = root
                for each in above:
                    home = home.make_folder(each)
                copy_contents(stream, home, name)
    if state_digest(state_of(open_checkpoint(folder, packed=True))) != anchor.state:
        raise ChainError("wrong_bytes", f"{store.name}/{anchor.folder}", "it is another model")


def check_outside(store: Store, root: Path) -> None:
    """Checks that a store is no part of a model's folder, which would hold it in its own anchor.

    Raises:
        TargetError: it is.
    """
    if isinstance(store, FolderStore) and store.root.resolve().is_relative_to(root.resolve()):
        raise TargetError(f"{store.name}: lies in the model's folder {root}; name one beside it for the chain")


def files_of_model(checkpoint: Checkpoint) -> list[StoredFile]:
    """The files of a model that belong into an anchor: all but hidden ones of its folder, or the one that it is.

    Raises:
        TargetError: a link, a device, or a name that an anchor cannot hold.
    """
    root = checkpoint.root
    if root.is_file():
        if not FILE_NAME.fullmatch(root.name) or root.suffix != ".safetensors":
            raise TargetError(f"{root}: an anchor cannot hold a file of this name; give the model's folder")
        return [StoredFile(root.name, *digest_of_file(root))]
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
