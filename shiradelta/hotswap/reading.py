"""Reads a whole file on several threads, into memory that a backend provides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shiradelta.errors import ShiraDeltaError
from shiradelta.format.codecs.base import Bytes
from shiradelta.io.reader import Source, bytes_of, explained
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import check_signed
from shiradelta.util.regular_file import open_regular
from shiradelta.util.threads import THREADS, map_in_threads

#: The fewest bytes that a thread reads.
_CHUNK = 4 << 20


def read_whole(source: Source, buffer: Callable[[int], Bytes], key: Keys | None = None) -> tuple[str, Bytes]:
    """Copies a file into memory that nobody else can change.

    Args:
        source: a path, bytes, or a binary file.
        buffer: allocates memory of a size.
        key: refuse what is not signed by one of these public keys.

    Returns:
        (a name for messages, the bytes).

    Raises:
        ShiraDeltaError: the file cannot be read.
        SignatureError: it is not signed by any of the keys.
    """
    label, data = _read(source, buffer)
    if key is not None:
        check_signed(data, source, key)
    return label, data


def _read(source: Source, buffer: Callable[[int], Bytes]) -> tuple[str, Bytes]:
    """`read_whole` of any source, signed or not."""
    if not isinstance(source, (str, os.PathLike)):
        content = bytes_of(source)
        data = buffer(content.size)
        data[:] = content
        return "delta", data
    label, path = os.fspath(source), Path(source)
    with explained(path):
        with open_regular(path) as stream:
            data = buffer(os.fstat(stream.fileno()).st_size)
        chunk = max(_CHUNK, -(-data.size // THREADS))

        def read(start: int) -> int:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(start)
                return stream.readinto(data[start : start + chunk].data) or 0

        if sum(map_in_threads(read, range(0, data.size, chunk))) != data.size:
            raise ShiraDeltaError(f"{label}: was cut short while it was read; try again")
    return label, data
