"""The form in which a device keeps a patch's sections, decompressed: RICE, and values in a codec that it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from shiradelta.backends.choose import AUTO, choose
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.format.codecs.packing import field_words
from shiradelta.format.record import Record, Section
from shiradelta.format.registry import IndexId
from shiradelta.format.zstd import unzstd
from shiradelta.io.reader import StoredTensor
from shiradelta.util.rows import rows_of
from shiradelta.util.threads import map_in_threads

NOTHING: Bytes = np.zeros(0, np.uint8)
_RICE = int(IndexId.RICE)
#: Makes a NamedTuple from all of its fields in half the time.
_new = tuple.__new__


class SectionPart(NamedTuple):
    """A section: bytes from start to stop - 1 of a file in memory, of an array of its own, or of one on the device."""

    source: Bytes | torch.Tensor
    start: int
    stop: int

    @classmethod
    def of(cls, content: bytes) -> SectionPart:
        """New bytes."""
        return cls(np.frombuffer(bytearray(content), np.uint8), 0, len(content))

    @classmethod
    def there(cls, section: torch.Tensor) -> SectionPart:
        """All of an array on the device."""
        return cls(section, 0, section.numel())

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    @property
    def content(self) -> torch.Tensor:
        """The bytes."""
        found = self.source[self.start : self.stop]
        return torch.from_numpy(found) if isinstance(found, np.ndarray) else found


class Resident(NamedTuple):
    """A patch's sections, and what the head of its index says.

    Attributes:
        positions: in RICE.
        values: in a codec that the device decodes.
        k: RICE's.
        unary_bits: RICE's.
    """

    positions: SectionPart
    values: SectionPart
    k: int
    unary_bits: int

    @classmethod
    def of(cls, positions: SectionPart, values: SectionPart) -> Resident:
        """Reads the head of positions that are in the host's memory; a patch without nonzeros has none."""
        source, start, stop = positions
        if start == stop:
            return cls(positions, values, 0, 0)
        assert isinstance(source, np.ndarray)
        return _new(cls, (positions, values, *registry.RICE_HEAD.unpack_from(source.data, start)))


class Sections(NamedTuple):
    """A patch's sections on the device.

    Attributes:
        buffer: uint8, with the sections of all patches of a delta.
        codec: that of the values; it differs from the file's if the device cannot decode that.
        index_at: where the index is in the buffer.
        index_size: its bytes.
        values_at: where the values are.
        values_size: their bytes.
        k: RICE's.
        unary_bits: RICE's.
        low: the offset of the low bits in the index.
        unary: the offset of the unary part in the index.
        codes: the offset of the codes in the values.
    """

    buffer: torch.Tensor
    codec: TorchDecoder
    index_at: int
    index_size: int
    values_at: int
    values_size: int
    k: int
    unary_bits: int
    low: int
    unary: int
    codes: int

    @property
    def index_bytes(self) -> torch.Tensor:
        """uint8."""
        return self.buffer[self.index_at : self.index_at + self.index_size]

    @property
    def values_bytes(self) -> torch.Tensor:
        """uint8."""
        return self.buffer[self.values_at : self.values_at + self.values_size]


def sections_of(
    buffer: torch.Tensor,
    every: Sequence[Resident],
    starts: Sequence[int],
    records: Sequence[Record],
    codecs: Sequence[TorchDecoder],
) -> list[Sections]:
    """The sections of patches, given where their indices and values start in the buffer, by turns."""
    rows = [
        (index.stop - index.start, values.stop - values.start, k, unary_bits, record.nnz, prod(record.shape))
        for (index, values, k, unary_bits), record in zip(every, records, strict=True)
    ]
    columns: Any = np.array(rows, np.int64).reshape(-1, 6).T  # functions of one number take a column
    sizes, values_sizes, k, unary_bits, nnz, numel = columns
    low = registry.RICE_HEAD.size + -(-unary_bits // registry.BLOCK_BITS) * 2 * registry.word_size(numel)
    codes = np.zeros_like(nnz)
    for codec in set(codecs):
        own = np.array([one is codec for one in codecs], np.bool_)
        codes[own] = codec.codes_at(nnz[own])
    numbers = sizes, starts[1::2], values_sizes, k, unary_bits, low, low + 4 * field_words(nnz, k), codes
    columns = [np.asarray(column).tolist() for column in (starts[::2], *numbers)]
    return rows_of(Sections, [buffer] * len(every), codecs, *columns)


def residents(tensors: Sequence[tuple[Bytes, StoredTensor, TorchDecoder]]) -> list[Resident]:
    """The sections of (file, tensor, codec of the values on the device): where the file has them so, or new bytes."""
    found = [_where(source, tensor.record, codec) for source, tensor, codec in tensors]
    new = [one for one, pair in zip(tensors, found, strict=True) if pair is None]
    made = iter(map_in_threads(lambda one: (_index(one[0], one[1]), _values(*one)), new))
    return [Resident.of(*(pair or next(made))) for pair in found]


def _where(source: Bytes, record: Record, codec: TorchDecoder) -> tuple[SectionPart, SectionPart] | None:
    """Where the file has a tensor's sections as the device keeps them; None where it does not."""
    (at, size, _, _, zstd), (values_at, values_size, _, _, values_zstd) = record.index, record.values
    as_stored = record.index_codec == _RICE and record.value_codec == codec.id and not (zstd or values_zstd)
    if not as_stored and record.nnz:
        return None
    return _new(SectionPart, (source, at, at + size)), _new(SectionPart, (source, values_at, values_at + values_size))


def _index(source: Bytes, tensor: StoredTensor) -> SectionPart:
    """A tensor's positions as RICE: in the file, or new bytes."""
    record = tensor.record
    if record.index_codec == IndexId.RICE:
        return stored(source, record.index)
    rice = choose(AUTO).index_codecs[IndexId.RICE]
    return SectionPart.of(rice.encode(tensor.positions(), record.shape))


def _values(source: Bytes, tensor: StoredTensor, codec: TorchDecoder) -> SectionPart:
    """A tensor's values in a codec: in the file, or new bytes."""
    record = tensor.record
    if codec.id == record.value_codec:
        return stored(source, record.values)
    return SectionPart.of(codec.encode(tensor.values() if codec.adds else tensor.bits()))


def stored(source: Bytes, section: Section) -> SectionPart:
    """A section, decompressed: in the file, or new bytes."""
    where = SectionPart(source, section.offset, section.offset + section.stored)
    return SectionPart.of(unzstd(source[where.start : where.stop], section.decoded)) if section.zstd else where
