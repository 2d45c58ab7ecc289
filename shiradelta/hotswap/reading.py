"""Reads a file on several threads: whole, into memory that a backend provides, or some tensors of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shiradelta.backends.choose import choose
from shiradelta.errors import ShiraDeltaError
from shiradelta.format import container, registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.header import read_header
from shiradelta.format.record import Record
from shiradelta.io.reader import Source, bytes_of, explained
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import check_signed
from shiradelta.util.regular_file import open_regular
from shiradelta.util.threads import THREADS, in_ranges, map_in_threads

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

        def copy(first: int, last: int) -> None:
            data[first:last] = content[first:last]

        in_ranges(copy, content.size, min(THREADS, content.size // _CHUNK))
        return "delta", data
    label, path = os.fspath(source), Path(source)
    with explained(path):
        with open_regular(path) as stream:
            data = buffer(os.fstat(stream.fileno()).st_size)
        _fill(label, path, data, [(0, data.size)])
    return label, data


class PartlyRead:
    """A file that is read part by part, into memory that nobody else can change.

    Its header and tables are read at once, and all of it where it is packed.  Bytes between sections are zero until
    they are read; a section is whatever was there.

    Args:
        source: the file.
        buffer: allocates memory of a size.

    Attributes:
        label: a name for messages.
        data: the file, as far as it has been read.

    Raises:
        ShiraDeltaError: the file cannot be read.
        FormatError: its header is refused.
    """

    def __init__(self, source: str | os.PathLike[str], buffer: Callable[[int], Bytes]) -> None:
        self.label, self._path = os.fspath(source), Path(source)
        with explained(self._path), open_regular(self._path) as stream:
            status = os.fstat(stream.fileno())
        self._same = _identity(status)
        self.data: Bytes = buffer(status.st_size)
        self.read_spans([(0, min(registry.HEADER_SIZE, self.data.size))])
        header = read_header(self.data)
        end = self.data.size if header.packed else min(container.tables_end(header), self.data.size)
        self.read_spans([(registry.HEADER_SIZE, end)])
        if not header.packed:
            table = self.data[registry.HEADER_SIZE : end][: header.whole_sizes[0]]
            between = container.between_sections(table.tobytes(), self.data.size)
            self.data[between[self.data[between] != 0]] = 0  # memory that is zero is not taken before it is written

    def read(self, records: Iterable[Record]) -> None:
        """Reads the sections of some tensors, and what is between them.

        Raises:
            ShiraDeltaError: the file cannot be read, or is another one by now.
            FormatError: there is something between them.
        """
        self.read_spans((record.index.offset, record.values.end) for record in records)
        self.check_between()

    def check_between(self) -> None:
        """Checks that bytes between sections are zero, as far as they have been read.  Raises FormatError."""
        accepts = choose().accepts
        if accepts is None or not accepts(self.data):
            container.parse(self.data)

    def read_spans(self, spans: Iterable[tuple[int, int]]) -> None:
        """Reads bytes from a start to an end, as `read`."""
        with explained(self._path):
            _fill(self.label, self._path, self.data, _joined(spans), self._same)

    def reading(self, spans: Iterable[tuple[int, int]]) -> Callable[[], None]:
        """A function that does `read_spans`, all on the thread that calls it."""
        joined = _joined(spans)

        def read() -> None:
            with explained(self._path):
                _read_here(self.label, self._path, self.data, joined, self._same)

        return read


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What differs when a file of the same name is another one, or has been written since."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without those that are empty; neighbours in one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start == found[-1][1]:
            found[-1] = found[-1][0], end
        elif start < end:
            found.append((start, end))
    return found


def _fill(
    label: str, path: Path, data: Bytes, spans: Iterable[tuple[int, int]], same: tuple[int, int, int, int] | None = None
) -> None:
    """Reads spans of a file to their places in `data`; `same` is the identity that the file has to have."""
    chunk = max(_CHUNK, -(-data.size // THREADS))
    pieces = [(at, min(at + chunk, end)) for start, end in spans for at in range(start, end, chunk)]
    map_in_threads(lambda piece: _read_here(label, path, data, [piece], same), pieces)


def _read_here(
    label: str, path: Path, data: Bytes, spans: Sequence[tuple[int, int]], same: tuple[int, int, int, int] | None
) -> None:
    """`_fill` on this thread."""
    with open(path, "rb", buffering=0) as stream:
        if same is not None and _identity(os.fstat(stream.fileno())) != same:
            raise ShiraDeltaError(f"{label}: was replaced while it was read; try again")
        for start, end in spans:
            stream.seek(start)
            while start < end:
                count = stream.readinto(data[start:end].data)
                if not count:
                    raise ShiraDeltaError(f"{label}: was cut short while it was read; try again")
                start += count
