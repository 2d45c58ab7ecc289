"""Object stores through obstore: S3, GCS and Azure where fsspec's own client for them is not installed.

Has the methods of fsspec's file systems that `RemoteStore` calls, and conditional writes.
"""

from __future__ import annotations

import io
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from shiradelta.util.optional import importing

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What a client calls one state of a file.
Tag = Any
#: Protocols of URLs that obstore knows.
PROTOCOLS = ("s3", "s3a", "gs", "az", "abfs", "abfss")


class ObjectFiles:
    """The files of one bucket.

    Args:
        url: such as "s3://bucket/run".
        options: what `obstore.store.from_url` takes, such as `endpoint=` or `client_options=`.

    Raises:
        MissingDependencyError: obstore is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        with importing("a store in a bucket"):
            import obstore
            from obstore.store import from_url
        self.protocol, _, rest = url.partition("://")
        # What fails is tried again by the caller, who knows what a repeated write means.
        no_retries = {"max_retries": 0, "retry_timeout": timedelta(seconds=60)}
        bucket, _, self.root = rest.partition("/")
        self._api = obstore
        self._store = from_url(f"{self.protocol}://{bucket}", **{"retry_config": no_retries, **options})

    def open(self, path: str, mode: str = "rb", block_size: int = 1 << 20) -> BinaryIO:
        """A file to read, which can be sought in.

        Raises:
            FileNotFoundError: there is none.
        """
        size = self._api.head(self._store, path)["size"]
        return cast(BinaryIO, io.BufferedReader(_ObjectReader(self._api, self._store, path, size), block_size))

    def put_file(self, local: str, path: str) -> None:
        """Sends a file of this machine."""
        self._api.put(self._store, path, Path(local))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: buckets have no folders."""

    def rm_file(self, path: str) -> None:
        """Removes a file; FileNotFoundError where the store says that there is none."""
        self._api.delete(self._store, path)

    def find(self, path: str) -> list[str]:
        """The paths of all files below a folder."""
        pages: Iterator[Any] = self._api.list(self._store, prefix=path)
        return [str(each["path"]) for page in pages for each in page]

    # ------------------------------------------------------------------------------- conditional writes

    def tagged(self, path: str, most: int) -> tuple[bytes, Tag]:
        """(the bytes of a small file, the tag of this state of it); one byte more than `most` where it has more.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._api.get(self._store, path)
        size, tag = found.meta["size"], {key: found.meta[key] for key in ("e_tag", "version") if found.meta[key]}
        return (bytes(found.bytes()) if size <= most else b"\0" * (most + 1)), tag

    def put_if(self, path: str, data: bytes, tag: Tag | None) -> bool:
        """Writes a file if it has still this tag, or with None if there is none; whether it did."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            self._api.put(self._store, path, data, mode="create" if tag is None else tag)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False
        except Exception as error:
            refuse_without_conditions(error)
            raise
        return True


def refuse_without_conditions(error: Exception) -> None:
    """Raises NotImplementedError where a service says that it has no conditional writes."""
    if isinstance(error, NotImplementedError) or "NotImplemented" in str(error):
        raise NotImplementedError(str(error)) from error


class _ObjectReader(io.RawIOBase):
    """Reads ranges of an object."""

    def __init__(self, api: Any, store: Any, path: str, size: int) -> None:
        self._api, self._store, self._path, self._size, self._at = api, store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        found = self._api.get_range(self._store, self._path, start=self._at, length=count)
        buffer[: len(found)] = memoryview(found)
        self._at += len(found)
        return len(found)
