"""A folder that is held open: files in it are read, made, replaced and removed, and no link is ever followed.

Where the system can, every call is relative to the folder's descriptor.  So nobody can put a link or another folder in
its place between two calls.  Elsewhere, as on Windows, `BY_DESCRIPTOR` is false, and each call looks for links first.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from shiradelta.errors import TargetError
from shiradelta.util.files import close_synced, sync_directory, temporary_name

#: Whether calls are relative to a descriptor; otherwise names are looked at before they are used.
BY_DESCRIPTOR = (
    {os.open, os.stat, os.mkdir, os.unlink, os.rmdir, os.rename, os.link} <= os.supports_dir_fd
    and os.listdir in os.supports_fd
    and hasattr(os, "O_NOFOLLOW")
    and hasattr(os, "O_DIRECTORY")
)
#: Flags of every file that is opened: no link is followed, and a FIFO does not make the call wait.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
#: Folders within folders that `remove` takes away; this package makes two.
_DEPTH = 8
#: The system's answers where a file system has no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)


class Directory:
    """A folder that is held open, as a context.  Names are those of its own entries, without a separator.

    The path that opens it is the user's and may lead over links; everything below it may not.

    Attributes:
        path: the folder's path, for messages.
    """

    def __init__(self, path: Path, above: Directory | None = None) -> None:
        self.path = path
        self._above = above
        self._inside: list[Directory] = []
        self._descriptor: int | None = None
        if BY_DESCRIPTOR:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            if above is None:
                self._descriptor = os.open(path, flags)
            else:
                self._descriptor = above._call(os.open, path.name, flags | os.O_NOFOLLOW)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the folder and those that were opened from it."""
        while self._inside:
            self._inside.pop().close()
        if self._descriptor is not None:
            close_synced(self._descriptor)
            self._descriptor = None

    def folder(self, name: str) -> Directory:
        """Opens a folder in this one; it is closed with this one.

        Raises:
            TargetError: it is a link, or no folder.
            OSError: there is none, or the system refuses.
        """
        status = self.status(name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise TargetError(f"{self.path / name}: {what_is(status)}, where a folder should be; delete it")
        inside = Directory(self.path / name, self)
        if inside._descriptor is None:
            os.scandir(inside.path).close()  # the system's own error if there is none
        self._inside.append(inside)
        return inside

    def make_folder(self, name: str) -> Directory:
        """Opens a folder in this one, and makes it durable if it is new."""
        if self.status(name) is None:
            with suppress(FileExistsError):
                self._call(os.mkdir, name)
            self.sync()
        return self.folder(name)

    def home(self, path: str) -> tuple[Directory, str]:
        """The folder and the name of a file below this one: (`unet`, "model.safetensors") of unet/model.safetensors."""
        *folders, name = path.split("/")
        found = self
        for each in folders:
            found = found.folder(each)
        return found, name

    def names(self) -> list[str]:
        """The names of everything in it, sorted, hidden ones too."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def status(self, name: str) -> os.stat_result | None:
        """The status of a name, of a link its own; None if there is nothing."""
        with suppress(FileNotFoundError):
            found: os.stat_result = self._call(os.stat, name, follow_symlinks=False)
            return found
        return None

    def is_this(self, status: os.stat_result | None) -> bool:
        """Whether a status is that of this folder."""
        own = os.stat(self.path if self._descriptor is None else self._descriptor)
        return status is not None and os.path.samestat(own, status)

    def open_file(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
        """A descriptor of a regular file.

        Raises:
            TargetError: it is a link, a device, or something else.
            OSError: there is none, or the system refuses.
        """
        status = self.status(name)
        if status is None or stat.S_ISREG(status.st_mode):
            descriptor: int = self._call(os.open, name, flags | _FLAGS, mode)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                return descriptor
            close_synced(descriptor)
        raise TargetError(f"{self.path / name}: {what_is(status)}, where a file should be; delete it")

    def reading(self, name: str) -> BinaryIO:
        """A regular file, opened to be read; raises as `open_file`."""
        return os.fdopen(self.open_file(name), "rb")

    @contextmanager
    def making(self, name: str, mode: int | None = None) -> Iterator[BinaryIO]:
        """A new binary file, made durable if the block succeeds and removed otherwise.

        Args:
            name: its name, which is free.
            mode: its permissions; None for those of any new file.
        """
        try:
            with os.fdopen(self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b") as stream:
                yield stream
                stream.flush()
                if mode is not None and hasattr(os, "fchmod"):
                    os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
        except FileExistsError:
            raise
        except BaseException:
            with suppress(OSError):
                self.remove(name)
            raise

    @contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """A binary file that replaces `name`, durably, if the block succeeds and is removed otherwise.

        After an error it may have been replaced all the same: the last step, which makes the new name durable, can
        fail, too.
        """
        before = self.status(name)
        temporary = temporary_name(name)
        try:
            with self.making(temporary, None if before is None else stat.S_IMODE(before.st_mode)) as stream:
                yield stream
            self.move(temporary, self, name)
        except BaseException:
            with suppress(OSError):
                self.remove(temporary)
            raise
        self.sync()

    def move(self, name: str, to: Directory, new: str) -> None:
        """Gives a file another name in this folder or another; what had the name is replaced."""
        self._both(os.replace, name, to, new)

    def keep(self, name: str, to: Directory, new: str) -> None:
        """Gives a regular file a second name, or a durable copy where the file system has no hard links."""
        try:
            self._both(os.link, name, to, new, **({"follow_symlinks": False} if BY_DESCRIPTOR else {}))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.copy(name, to, new)
        status = to.status(new)
        if status is None or not stat.S_ISREG(status.st_mode):
            to.remove(new)
            raise TargetError(f"{self.path / name}: is not a file of this tool; delete it")

    def copy(self, name: str, to: Directory, new: str) -> None:
        """Copies a regular file, durably, with its permissions."""
        with self.reading(name) as source:
            copy_contents(source, to, new)

    def remove(self, name: str, depth: int = _DEPTH) -> None:
        """Removes a file, or a folder with all that is in it; nothing happens if there is none."""
        status = self.status(name)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            self._call(os.unlink, name)
            return
        if not depth:
            raise TargetError(f"{self.path / name}: is deeper than any folder of this tool; delete it")
        with Directory(self.path / name, self) as inside:
            for each in inside.names():
                inside.remove(each, depth - 1)
        self._call(os.rmdir, name)

    def sync(self) -> None:
        """Makes the names in this folder durable, where the system can."""
        if self._descriptor is None:
            sync_directory(self.path)
        else:
            os.fsync(self._descriptor)

    def _where(self, name: str) -> str:
        """The name for a system call: itself beside a descriptor, or the whole path, on which there is no link."""
        if name in ("", ".", "..") or {"/", os.sep, "\0"} & set(name):
            raise TargetError(f"{self.path}: {name!r} is no name of a file in this folder; delete what names it")
        if self._descriptor is not None:
            return name
        folder = self
        while folder._above is not None:
            if not stat.S_ISDIR(os.lstat(folder.path).st_mode):
                raise TargetError(
                    f"{folder.path}: {what_is(os.lstat(folder.path))}; put the folder itself in its place"
                )
            folder = folder._above
        return os.fspath(self.path / name)

    def _call(self, function: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        """Calls a function of `os` on a name in this folder; its error has the whole path."""
        try:
            if self._descriptor is not None:
                options["dir_fd"] = self._descriptor
            return function(self._where(name), *args, **options)
        except OSError as error:
            error.filename = os.fspath(self.path / name)
            raise

    def _both(self, function: Callable[..., Any], name: str, to: Directory, new: str, **options: Any) -> None:
        """Calls a function of `os` on names in two folders."""
        try:
            if self._descriptor is not None:
                options |= {"src_dir_fd": self._descriptor, "dst_dir_fd": to._descriptor}
            function(self._where(name), to._where(new), **options)
        except OSError as error:
            error.filename, error.filename2 = os.fspath(to.path / new), None
            raise


def copy_contents(source: BinaryIO, to: Directory, name: str) -> None:
    """Copies an open file to a new one, durably, with its permissions; shares the blocks where the system can."""
    status = os.fstat(source.fileno())
    with to.making(name, stat.S_IMODE(status.st_mode) | stat.S_IWUSR) as target:
        source.seek(0)
        copied = 0
        if hasattr(os, "copy_file_range"):
            with suppress(OSError):  # another file system, or an old kernel: the loop below does the rest
                while some := os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                    copied += some
        source.seek(copied)
        target.seek(copied)
        while chunk := source.read(1 << 20):
            target.write(chunk)


def what_is(status: os.stat_result) -> str:
    """What has a status, in words that follow its path: "is a folder"."""
    kinds = (
        (stat.S_ISLNK, "is a link, which may lead anywhere"),
        (stat.S_ISDIR, "is a folder"),
        (stat.S_ISFIFO, "is a named pipe"),
        (stat.S_ISSOCK, "is a socket"),
        (stat.S_ISREG, "is a file"),
    )
    return next((words for holds, words in kinds if holds(status.st_mode)), "is a device")
