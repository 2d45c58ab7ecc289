"""Reads a file on several threads: whole, into memory that a backend provides, or some tensors of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from shiradelta.backends.choose import choose
from shiradelta.errors import ShiraDeltaError
from shiradelta.format import container, registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.header import read_header
from shiradelta.format.record import Record
from shiradelta.io.reader import Source, bytes_of, explained
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import check_signed
from shiradelta.util.regular_file import open_regular, read_at
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
    with _OpenFile(source, buffer) as file:
        file.fill([(0, file.data.size)])
        return file.label, file.data


class _OpenFile:
    """An open file, and memory of its size that it is read into.

    Raises:
        ShiraDeltaError: there is no such file, or it cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str], buffer: Callable[[int], Bytes]) -> None:
        self.label, self._path = os.fspath(source), Path(source)
        with explained(self._path):
            self._stream = open_regular(self._path)
        self._same = self._state()
        self.data = buffer(self._same[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _state(self) -> tuple[int, int]:
        """What differs when the file has been written since: its size and the time of the last change."""
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns

    def fill(self, spans: Iterable[tuple[int, int]]) -> None:
        """Reads bytes from starts to ends, on several threads.

        Raises:
            ShiraDeltaError: the file cannot be read, or was changed meanwhile.
        """
        chunk = max(_CHUNK, -(-self.data.size // THREADS))
        pieces = [(at, min(at + chunk, end)) for start, end in _joined(spans) for at in range(start, end, chunk)]
        map_in_threads(self._read, pieces)
        self.check_same()

    def filling(self, spans: Iterable[tuple[int, int]]) -> Callable[[], None]:
        """A function that does `fill` on the thread that calls it, but for `check_same`."""
        joined = _joined(spans)

        def fill() -> None:
            for span in joined:
                self._read(span)

        return fill

    def _read(self, span: tuple[int, int]) -> None:
        """Makes few calls of the system: threads take the interpreter's lock from each other at each of them."""
        (start, end), descriptor = span, self._stream.fileno()
        with explained(self._path):
            while start < end:
                count = read_at(descriptor, self.data[start:end].data, start)
                if not count:
                    raise self._changed("cut short")
                start += count

    def check_same(self) -> None:
        """Checks that nothing has written the file since it was opened.  Raises ShiraDeltaError."""
        if self._state() != self._same:
            raise self._changed("written")

    def _changed(self, how: str) -> ShiraDeltaError:
        return ShiraDeltaError(f"{self.label}: was {how} while it was read; try again")


class PartlyRead(_OpenFile):
    """An open file that is read part by part, into memory that nobody else can change.

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
        super().__init__(source, buffer)
        try:
            self._read_tables()
        except BaseException:
            self.__exit__()
            raise

    def _read_tables(self) -> None:
        self._read((0, min(registry.HEADER_SIZE, self.data.size)))
        header = read_header(self.data)
        if header.packed:
            self.fill([(registry.HEADER_SIZE, self.data.size)])
            return
        end = min(container.tables_end(header), self.data.size)
        self._read((registry.HEADER_SIZE, end))
        table = self.data[registry.HEADER_SIZE : end][: header.whole_sizes[0]]
        between = container.between_sections(table.tobytes(), self.data.size)
        self.data[between[self.data[between] != 0]] = 0  # memory that is zero is not taken before it is written

    def read(self, records: Iterable[Record]) -> None:
        """Reads the sections of some tensors, and what is between them.

        Raises:
            ShiraDeltaError: the file cannot be read, or was changed meanwhile.
            FormatError: there is something between them.
        """
        self.fill((record.index.offset, record.values.end) for record in records)
        self.check_read()

    def check_read(self) -> None:
        """Checks what has been read: that the file is the same, and that bytes between sections are zero.

        Raises:
            ShiraDeltaError: it was changed meanwhile.
            FormatError: they are not.
        """
        self.check_same()
        accepts = choose().accepts
        if accepts is None or not accepts(self.data):
            container.parse(self.data)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without those that are empty; neighbours in one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start == found[-1][1]:
            found[-1] = found[-1][0], end
        elif start < end:
            found.append((start, end))
    return found
