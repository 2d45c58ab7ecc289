"""Opens files that others name, which may be pipes or devices."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO

#: Guards where open files are, on systems that cannot read at a place.
_moving = threading.Lock()


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read bytes.

    A name from another file may be that of a pipe or a device, where `open` would wait or never end.

    Raises:
        OSError: it cannot be opened, or is no regular file; also where the name is impossible (NUL, surrogates).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"impossible name: {error}", str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            directory = (errno.EISDIR, os.strerror(errno.EISDIR))
            raise OSError(*(directory if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")), str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_at(descriptor: int, room: memoryview, offset: int) -> int:
    """Reads bytes of an open file into `room`; returns how many, 0 at its end.  Safe in several threads.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [room], offset)
    with _moving:  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(room))
    room[: len(found)] = found
    return len(found)


def read_small(path: Path, most: int) -> bytes | None:
    """The bytes of a regular file; None if it has more than `most`, which are not read then.

    Raises:
        OSError: as `open_regular`, or it cannot be read.
    """
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    return data if len(data) <= most else None
