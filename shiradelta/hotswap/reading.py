"""Reads a whole file on several threads, into memory that a backend provides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shiradelta.errors import ShiraDeltaError
from shiradelta.format.codecs.base import Bytes
from shiradelta.io.reader import Source, bytes_of
from shiradelta.io.recognise import Wanted, explain
from shiradelta.util.threads import THREADS, map_in_threads

#: The fewest bytes that a thread reads.
_CHUNK = 4 << 20


def read_whole(source: Source, buffer: Callable[[int], Bytes]) -> tuple[str, Bytes]:
    """Copies a file into memory that nobody else can change.

    Args:
        source: a path, bytes, or a binary file.
        buffer: allocates memory of a size.

    Returns:
        (a name for messages, the bytes).

    Raises:
        ShiraDeltaError: the file cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        content = bytes_of(source)
        data = buffer(content.size)
        data[:] = content
        return "delta", data
    label, path = os.fspath(source), Path(source)
    try:
        data = buffer(path.stat().st_size)
        chunk = max(_CHUNK, -(-data.size // THREADS))

        def read(start: int) -> int:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(start)
                return stream.readinto(data[start : start + chunk].data) or 0

        if sum(map_in_threads(read, range(0, data.size, chunk))) != data.size:
            raise ShiraDeltaError(f"{label}: was cut short while it was read; try again")
    except OSError as error:
        message = explain(path, Wanted.DELTA) or f"{label}: cannot be read ({error.strerror}); check the path"
        raise ShiraDeltaError(message) from None
    return label, data
