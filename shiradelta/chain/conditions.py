"""Writing a file only if nothing else has written it meanwhile, as far as the place of the file can tell."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

from shiradelta.chain.objects import ObjectFiles, Tag, refuse_without_conditions
from shiradelta.errors import ChainError


class Readable(Protocol):
    """What is asked of a store here (`shiradelta.chain.stores.Store`)."""

    name: str

    def read(self, path: str, most: int) -> bytes:
        """As `Store.read`."""

    def writing(self, path: str) -> AbstractContextManager[BinaryIO]:
        """As `Store.writing`."""


class Conditional(Protocol):
    """A client of a store with conditional writes."""

    def tagged(self, path: str, most: int) -> tuple[bytes, Tag]:
        """(the bytes of a small file, the tag of this state of it); one byte more than `most` where it has more.

        Raises:
            FileNotFoundError: there is none.
        """

    def put_if(self, path: str, data: bytes, tag: Tag | None) -> bool:
        """Writes a file if it has still this tag, or with None if there is none; whether it did.

        Raises:
            NotImplementedError: the service has no conditions.
        """


class S3fsConditions:
    """Conditional writes through s3fs."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def tagged(self, path: str, most: int) -> tuple[bytes, Tag]:
        """As `Conditional.tagged`."""
        with self._files.open(path, "rb") as stream:
            return stream.read(most + 1), str(stream.details["ETag"])

    def put_if(self, path: str, data: bytes, tag: Tag | None) -> bool:
        """As `Conditional.put_if`."""
        try:
            self._files.pipe_file(path, data, **({"mode": "create"} if tag is None else {"IfMatch": tag}))
        except FileNotFoundError:
            return False  # it was removed
        except OSError as error:
            refuse_without_conditions(error)
            if "PreconditionFailed" not in str(error) and "pre-conditions" not in str(error):
                raise
            return False
        return True


def conditions_of(files: Any) -> Conditional | None:
    """The conditional writes of a client; None if it has none."""
    if isinstance(files, ObjectFiles):
        return files
    if type(files).__module__.partition(".")[0] == "s3fs":
        return S3fsConditions(files)
    return None


def check_same(found: bytes | None, expected: bytes | None, where: str) -> None:
    """Checks that a file is as it was read or written.

    Raises:
        ChainError: another process has written it.
    """
    if found != expected:
        raise ChainError("busy", where, "it was written meanwhile")


def swap_by_reading(store: Readable, path: str, data: bytes, old: bytes | None) -> None:
    """`Store.swap` for a place without conditional writes: reads the file before and after it is written.

    Without a lock, another process may write between the two unseen.
    """
    where = f"{store.name}/{path}"
    check_same(read_if_there(store, path, len(old or b"")), old, where)
    with store.writing(path) as stream:
        stream.write(data)
    check_same(read_if_there(store, path, len(data)), data, where)


def read_if_there(store: Readable, path: str, most: int) -> bytes | None:
    """`Store.read`; None if there is no such file."""
    try:
        return store.read(path, most)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ChainError("store_failed", f"{store.name}/{path}", error.strerror or str(error)) from error
