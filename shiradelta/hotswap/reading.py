"""Reading a whole file on several threads, and other work that is done so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from shiradelta.errors import ShiraDeltaError
from shiradelta.format.codecs.base import Bytes
from shiradelta.io.reader import Source

#: Bytes that a thread reads at the least.
_CHUNK = 4 << 20
_THREADS = min(16, os.cpu_count() or 1)
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, in order.  A thread takes a share of them at once: handing out single ones costs more."""
    shares = [items[i::_THREADS] for i in range(min(_THREADS, len(items)))]
    if len(shares) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(len(shares)) as pool:
        done = list(pool.map(lambda share: [work(item) for item in share], shares))
    return [done[i % len(shares)][i // len(shares)] for i in range(len(items))]


def read_whole(source: Source, buffer: Callable[[int], Bytes]) -> tuple[str, Bytes]:
    """(what to call it, its bytes), copied, so that nobody can change them under us.

    Args:
        source: a path, bytes, or a binary file.
        buffer: gives memory of a size.

    Raises:
        ShiraDeltaError: it cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        content = np.frombuffer(source if isinstance(source, (bytes, np.ndarray)) else source.read(), np.uint8)
        data = buffer(content.size)
        data[:] = content
        return "delta", data
    label, path = os.fspath(source), Path(source)
    try:
        data = buffer(path.stat().st_size)
        chunk = max(_CHUNK, -(-data.size // _THREADS))

        def read(start: int) -> int:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(start)
                return stream.readinto(data[start : start + chunk].data) or 0

        if sum(in_threads(read, range(0, data.size, chunk))) != data.size:
            raise ShiraDeltaError(f"{label}: was cut short while it was read; try again")
    except OSError as error:
        raise ShiraDeltaError(f"{label}: cannot be read ({error.strerror}); check the path") from None
    return label, data
