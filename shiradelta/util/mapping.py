"""Files mapped into memory; an error of the system names the file."""

from __future__ import annotations

import mmap
import os


def map_file(descriptor: int, path: str | os.PathLike[str], size: int, offset: int = 0) -> mmap.mmap:
    """Maps a part of an open file to read it; the map outlasts the descriptor.

    Args:
        descriptor: the file.
        path: its path, for an error.
        size: number of bytes, which are in the file; not 0.
        offset: where they begin; a multiple of `mmap.ALLOCATIONGRANULARITY`.

    Raises:
        OSError: it cannot be mapped, as where memory or the number of maps is at its limit.
    """
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, offset=offset)
    except OSError as error:
        why = f"cannot be mapped into memory ({error.strerror})"
        raise OSError(error.errno, why, os.fspath(path)) from None
