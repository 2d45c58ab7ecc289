"""Stores that fsspec knows: S3, GCS, Azure, HTTP, SFTP and others, by their URLs.

What is read goes through a folder on this machine, by its SHA-256: a file is downloaded once, and a download that was
interrupted goes on where it was.  A call that fails is repeated some times.

There are no locks.  S3, GCS and Azure write a manifest only if it is the one that was read; elsewhere it is read before
and after it is written, and one process publishes at a time.
"""

from __future__ import annotations

import copy
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shiradelta.chain.conditions import check_same, conditions_of, read_if_there, swap_by_reading
from shiradelta.chain.digests import check_file
from shiradelta.chain.objects import PROTOCOLS, ObjectFiles
from shiradelta.chain.rows import KINDS
from shiradelta.errors import ArgumentError, ChainError, TargetError
from shiradelta.util.files import os_errors, sync_directory
from shiradelta.util.locks import try_lock_if_possible
from shiradelta.util.optional import failed_import, importing

Result = TypeVar("Result")
#: Protocols whose files appear whole when all of them was sent.
_WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory", "oci", "oss")
#: Protocols whose files appear while they are written, and can be given another name at once.
_RENAMED = ("file", "local", "sftp", "ssh", "smb", "ftp", "webdav")
#: How often a call is tried, and the seconds before it is tried again, doubled each time.
_TRIES, _PAUSE = 5, 0.2
#: Bytes of a request: fewer take longer where each has to wait, more are lost with a connection or a time limit.
_CHUNK = 4 << 20
#: Answers of HTTP from 400 to 499 that may be others the next time: too slow, too early, too many requests.
_PASSING = (408, 425, 429)


class RemoteStore:
    """A place that fsspec knows.

    Args:
        url: such as "s3://bucket/run" or "https://host/run".  Over HTTP a chain can be followed, not published.
        cache: the folder for what was read; None for `SHIRADELTA_CACHE`, or the user's own.
        options: what fsspec's file system takes, or obstore where it is taken, such as credentials.

    Raises:
        MissingDependencyError: fsspec, or what it needs for this URL, is not installed, nor is obstore.
        ArgumentError: fsspec does not know such URLs.
        ChainError: the place cannot be reached, where its client connects at once.
    """

    def __init__(self, url: str, cache: str | os.PathLike[str] | None = None, **options: Any) -> None:
        with importing("a store that is no folder"):
            from fsspec.core import url_to_fs
        self.name = url.rstrip("/")
        try:
            self._fs, self._root = url_to_fs(self.name, **{"use_listings_cache": False, **options})
        except ImportError as error:
            if self.name.partition("://")[0] not in PROTOCOLS or find_spec("obstore") is None:
                raise failed_import(error, f"the store {url}") from error
            self._fs = ObjectFiles(self.name, **options)
            self._root = self._fs.root
        except ValueError as error:
            raise ArgumentError(f"{url}: fsspec does not know such a store ({error}); check the URL") from None
        except OSError as error:  # some clients connect at once
            raise ChainError("store_failed", self.name, _said(error)) from error
        home = os.environ.get("SHIRADELTA_CACHE") or Path.home() / ".cache" / "shiradelta"
        self._cache = Path(home if cache is None else cache) / "chains"
        self._anew: set[str] | None = None  # paths that were read, where each has to be once
        protocol = self._fs.protocol
        self._protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        self._is_http = bool({"http", "https"} & {*self._protocols})

    def read(self, path: str, most: int) -> bytes:
        """As `Store.read`; of a file that is replaced meanwhile, all of one state."""

        def read() -> bytes:
            # In one request: a size that is asked for first may be that of the file before.
            if isinstance(self._fs, ObjectFiles):
                return self._fs.tagged(self._at(path), most)[0]
            options = {"block_size": 0} if self._is_http else {}
            found = bytearray()
            with self._fs.open(self._at(path), "rb", **options) as stream:
                while len(found) <= most and (part := stream.read(most + 1 - len(found))):
                    found += part
            return bytes(found)

        return self._tried(path, read)

    def fetched(self, path: str, size: int, sha256: str) -> Path:
        """As `Store.fetched`; what is in the cache is not downloaded again."""
        target, where = self._cache / sha256[:2] / sha256, f"{self.name}/{path}"
        with os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        if self._anew is None or path in self._anew:
            with suppress(ChainError):
                check_file(target, size, sha256, where)
                return target
        with _part_of(target) as part:
            for resumed in (part.seek(0, os.SEEK_END) > 0, False):
                try:
                    self._download(path, part, size)
                    check_file(Path(part.name), size, sha256, where)
                    break
                except FileNotFoundError:
                    raise ChainError("missing_file", where) from None
                except ChainError as error:
                    if error.reason == "wrong_bytes":
                        part.truncate(0)
                    if error.reason != "wrong_bytes" or not resumed:
                        raise
            with os_errors(target):
                os.fsync(part.fileno())
                os.replace(part.name, target)
                sync_directory(target.parent)
        if self._anew is not None:
            self._anew.add(path)
        return target

    def fresh(self) -> RemoteStore:
        """As `Store.fresh`."""
        other = copy.copy(self)
        other._anew = set()
        return other

    def _download(self, path: str, part: BinaryIO, size: int) -> None:
        """Appends what is missing; a try that got something does not count."""
        begun, tries = -1, _TRIES
        while (offset := part.seek(0, os.SEEK_END)) < size:
            tries = _TRIES if offset > begun else tries - 1
            begun = offset
            try:
                with self._fs.open(self._at(path), "rb", block_size=_CHUNK) as stream:
                    _skip(stream, offset)
                    while chunk := stream.read(min(_CHUNK, size - part.tell())):
                        part.write(chunk)
                    if part.tell() < size:  # it is shorter: a digest tells what it is
                        return
            except KeyboardInterrupt:
                raise
            except Exception as error:
                if self._says_missing(error):
                    raise
                self._refuse_or_wait(path, error, tries)
        part.flush()

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """As `Store.writing`."""
        if not {*_WHOLE, *_RENAMED} & set(self._protocols):
            known = ", ".join((*_WHOLE, *_RENAMED))
            raise TargetError(f"{self.name}: a chain is not published over {self._protocols[0]}; take one of {known}")
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            with open(local, "w+b") as stream:
                yield stream
            self._tried(path, lambda: self._put(local, self._at(path)))

    def swap(self, path: str, data: bytes, old: bytes | None) -> None:
        """As `Store.swap`; by a conditional write where the client has such."""
        client = conditions_of(self._fs)
        if client is None:
            swap_by_reading(self, path, data, old)
            return
        at, where, tag = self._at(path), f"{self.name}/{path}", None
        if old is not None:
            try:
                found, tag = self._tried(path, lambda: client.tagged(at, len(old)))
            except FileNotFoundError:
                found = None
            check_same(found, old, where)
        try:
            self._tried(path, lambda: client.put_if(at, data, tag))
        except NotImplementedError:  # a service that speaks like S3, and has no conditions
            swap_by_reading(self, path, data, old)
            return
        # A try whose answer was lost may have written it, so that the next one was refused.
        check_same(read_if_there(self, path, len(data)), data, where)

    def _put(self, local: Path, target: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if set(self._protocols) & set(_WHOLE):
            self._fs.put_file(str(local), target)
            return
        temporary = f"{target}.{secrets.token_hex(8)}.tmp"
        try:
            self._fs.put_file(str(local), temporary)
            self._fs.mv(temporary, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def remove(self, path: str) -> None:
        """As `Store.remove`."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))

        self._tried(path, remove)

    def files(self) -> list[str]:
        """As `Store.files`."""

        def find() -> list[str]:
            found: list[str] = []
            for kind in KINDS:
                with suppress(FileNotFoundError):
                    found += self._fs.find(self._at(kind))
            return found

        start = len(self._at(""))
        return sorted(path[start:] for path in self._tried("", find))

    def locked(self) -> AbstractContextManager[None]:
        """As `Store.locked`; nothing keeps other publishers out."""
        return nullcontext()

    def _at(self, path: str) -> str:
        root = self._root.rstrip("/")
        return f"{root}/{path}" if root else path

    def _tried(self, path: str, work: Callable[[], Result]) -> Result:
        """Calls something that may fail, some times.

        Raises:
            FileNotFoundError: there is no such file.
            ChainError: it has failed each time.
        """
        for tries in range(_TRIES, -1, -1):
            try:
                return work()
            except (KeyboardInterrupt, NotImplementedError):
                raise
            except Exception as error:
                if self._says_missing(error):
                    raise
                self._refuse_or_wait(path, error, tries)
        raise AssertionError  # the last one was refused

    def _says_missing(self, error: Exception) -> bool:
        """Whether the store says that there is no such file; fsspec calls whatever fails over HTTP so."""
        cause = error.__cause__ if self._is_http else None
        final = 400 <= getattr(cause, "status", 0) < 500 and getattr(cause, "status", 0) not in _PASSING
        return isinstance(error, FileNotFoundError) and (cause is None or isinstance(cause, FileNotFoundError) or final)

    def _refuse_or_wait(self, path: str, error: Exception, tries: int) -> None:
        """Waits before the next try; without one, raises."""
        if tries <= 0 or isinstance(error, PermissionError | NotImplementedError):
            # fsspec calls whatever fails over HTTP a missing file; what it was is the cause.
            cause = error.__cause__ if self._is_http and isinstance(error, FileNotFoundError) else None
            raise ChainError("store_failed", f"{self.name}/{path}", _said(cause or error)) from error
        time.sleep(_PAUSE * 2 ** (_TRIES - tries))


def _said(error: BaseException) -> str:
    """What an error of a client says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _skip(stream: BinaryIO, offset: int) -> None:
    """Goes to a byte; some servers give a file from its beginning only."""
    try:
        stream.seek(offset)
    except (OSError, ValueError, NotImplementedError):
        while offset > 0 and (chunk := stream.read(min(_CHUNK, offset))):
            offset -= len(chunk)


@contextmanager
def _part_of(target: Path) -> Iterator[BinaryIO]:
    """The file of an interrupted download, to go on with; another one while another process has it."""
    with os_errors(target):
        stream = open(target.with_name(f"{target.name}.part"), "a+b")  # noqa: SIM115 - closed below
        if not try_lock_if_possible(stream.fileno()):
            stream.close()
            stream = open(target.with_name(f"{target.name}.{secrets.token_hex(8)}.part"), "a+b")  # noqa: SIM115
    with stream:
        yield stream
