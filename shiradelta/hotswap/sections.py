"""Sections of a file that several processes read together: none reads all of one, and its checksum is checked.

A checksum covers a whole section.  Each process reads the chunks that it needs, and a share of the others.  It tells
the checksums of all chunks that it has read: every chunk has to be the same in all processes that read it, and together
they have to give the section's checksum.  So no process uses a byte that the section's checksum does not cover.

A process that decodes some blocks of an index compares the directory's entries behind them with what it decodes.
Together the processes decode all blocks, so each entry follows from the first one, as where one process decodes all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shiradelta.errors import FormatError
from shiradelta.format.codecs import VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.rice import Blocks, blocks_between
from shiradelta.format.header import crc32
from shiradelta.format.record import Record, Section
from shiradelta.format.registry import RICE_HEAD, IndexId
from shiradelta.format.table import Table
from shiradelta.models.sharded import Rows
from shiradelta.util.threads import map_in_threads

#: Reads bytes of a file from starts to ends.
ReadSpans = Callable[[Iterable[tuple[int, int]]], None]
#: Bytes of a chunk: a page, which systems read whole.
CHUNK = 4096
#: The fewest chunks of a section for which parts are worth while.
_FEW = 4


class Chunks(NamedTuple):
    """What a process has read of a section.

    Attributes:
        numbers: of the chunks, int64, increasing.
        checksums: of each, uint32.
    """

    numbers: NDArray[np.int64]
    checksums: NDArray[np.uint32]


class Reading(NamedTuple):
    """What a process has read of a tensor.

    Attributes:
        positions: of its index.
        values: of its values.
        blocks: the blocks of the index that it decodes; none where it has no element of the tensor.
    """

    positions: Chunks
    values: Chunks
    blocks: Blocks


def can_be_shared(record: Record) -> bool:
    """Whether a part of a tensor can be decoded from a part of its sections, and they are large enough for it."""
    sections = record.index, record.values
    return (
        record.index_codec == IndexId.RICE
        and record.nnz > 0
        and VALUE_CODECS.by_id[record.value_codec].spans(record.nnz, record.element_size, 0, 0) is not None
        and not any(section.zstd for section in sections)
        and max(section.stored for section in sections) >= _FEW * CHUNK
    )


class _PartOfSection:
    """A section that is read in chunks.

    Args:
        section: where it is.
        data: the file, to read it into.
        read: reads spans of the file.
    """

    def __init__(self, section: Section, data: Bytes, read: ReadSpans) -> None:
        self.content = data[section.offset : section.offset + section.stored]
        self._offset, self._read = section.offset, read
        self._there = np.zeros(-(-section.stored // CHUNK), np.bool_)

    def need(self, spans: Iterable[tuple[int, int]]) -> None:
        """Reads the chunks that spans of the section lie in, unless they were read before."""
        wanted = np.zeros_like(self._there)
        for start, stop in spans:
            if start < stop:
                wanted[start // CHUNK : -(-stop // CHUNK)] = True
        missing = np.flatnonzero(wanted & ~self._there).tolist()
        bounds = [(CHUNK * number, min(CHUNK * (number + 1), self.content.size)) for number in missing]
        self._read([(self._offset + start, self._offset + stop) for start, stop in bounds])
        self._there |= wanted

    def share(self, number: int, members: int) -> tuple[int, int]:
        """The span of one of so many shares of the section."""
        start, stop = (self._there.size * one // members for one in (number, number + 1))
        return CHUNK * start, min(CHUNK * stop, self.content.size)

    def chunks(self) -> Chunks:
        """What was read."""
        numbers = np.flatnonzero(self._there)
        found = [crc32(self.content[CHUNK * at : CHUNK * (at + 1)]) for at in numbers.tolist()]
        return Chunks(numbers, np.array(found, np.uint32))


def read_shared(shared: Mapping[str, tuple[Record, Rows]], data: Bytes, read: ReadSpans) -> dict[str, Reading]:
    """Reads what a process needs of tensors that several processes share, and its share of the rest.

    Args:
        shared: name -> the tensor's row in the table, which `can_be_shared`, and the elements that the process needs.
        data: the file, to read into.
        read: reads spans of the file.

    Returns:
        What was read; `check_together` takes it.

    Raises:
        FormatError: the head of an index, or its directory, is wrong.
    """
    found = map_in_threads(lambda one: _read_rows(*one, data, read), list(shared.values()))
    return dict(zip(shared, found, strict=True))


def _read_rows(record: Record, rows: Rows, data: Bytes, read: ReadSpans) -> Reading:
    """`read_shared` of one tensor."""
    index, values = (_PartOfSection(one, data, read) for one in (record.index, record.values))
    index.need([(0, RICE_HEAD.size)])
    codec = VALUE_CODECS.by_id[record.value_codec]
    try:
        found = blocks_between(
            index.content, record.nnz, record.numel, rows.start, rows.stop, lambda stop: index.need([(0, stop)])
        )
    except FormatError as error:
        error.tensor, error.offset = record.name, record.index.offset
        raise
    needed = codec.spans(record.nnz, record.element_size, *found.ranks) or ()
    for part, spans in ((index, found.spans), (values, needed)):
        part.need([*spans, part.share(rows.number, rows.members)])
    return Reading(index.chunks(), values.chunks(), found.blocks)


def check_together(label: str, every: Sequence[Mapping[str, Reading]], table: Table) -> None:
    """Checks what all processes have read of the tensors that they share.

    Args:
        label: the file, for messages.
        every: the readings of each process, by tensor.
        table: the file's table.

    Raises:
        FormatError: a section is damaged.
    """
    for name in dict.fromkeys(name for readings in every for name in readings):
        some = [readings[name] for readings in every if name in readings]
        record = table.named(name)
        for section, chunks in (
            (record.index, [one.positions for one in some]),
            (record.values, [one.values for one in some]),
        ):
            if _joined(section.stored, chunks) != section.crc:
                raise FormatError("section_checksum", tensor=name, file=label, offset=section.offset)
        reach = 0
        for blocks in sorted(one.blocks for one in some):
            reach = max(reach, blocks.stop) if blocks.start <= reach else reach
        if reach < some[0].blocks.blocks:
            raise FormatError("bad_directory", "a block is between others", tensor=name, file=label)


def _joined(size: int, parts: Sequence[Chunks]) -> int | None:
    """The checksum of a section, from those of its chunks; None where one was not read, or differs between parts."""
    count = -(-size // CHUNK)
    known, there = np.zeros(count, np.uint32), np.zeros(count, np.bool_)
    for numbers, checksums in parts:
        if np.any(there[numbers] & (known[numbers] != checksums)):
            return None
        known[numbers], there[numbers] = checksums, True
    if not there.all():
        return None
    rest = bytes(size % CHUNK or CHUNK)
    # What comes before the last chunk changes the checksum as it changes that of zeros.
    return crc32(rest, _of_full_chunks(known[:-1])) ^ crc32(rest) ^ int(known[-1])


def _of_full_chunks(checksums: NDArray[np.uint32]) -> int:
    """The checksum of chunks, from theirs: of pairs, of pairs of pairs, and so on."""
    level = 0
    while checksums.size > 1:
        if checksums.size % 2:
            checksums = np.append(np.uint32(0), checksums)  # that of no bytes
        checksums = _moved(_tables(level), checksums[::2]) ^ checksums[1::2]
        level += 1
    return int(checksums[0]) if checksums.size else 0


@cache
def _tables(level: int) -> NDArray[np.uint32]:
    """How a checksum's four bytes change it when 2^level chunks of zeros follow: uint32 [4, 256]."""
    if level:
        return _moved(_tables(level - 1), _tables(level - 1))
    zeros = bytes(CHUNK)
    every = [[crc32(zeros, byte << shift) ^ crc32(zeros) for byte in range(256)] for shift in range(0, 32, 8)]
    return np.array(every, np.uint32)


def _moved(tables: NDArray[np.uint32], checksums: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What such tables make of checksums."""
    found: NDArray[np.uint32] = tables[0, checksums & 255]
    for number in range(1, 4):
        found = found ^ tables[number, (checksums >> np.uint32(8 * number)) & 255]
    return found
