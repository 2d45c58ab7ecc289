"""The form in which a device keeps a patch's sections, decompressed: RICE, and values in a codec that it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from shiradelta.backends.choose import AUTO, choose
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.format.record import Section
from shiradelta.format.registry import IndexId
from shiradelta.format.zstd import unzstd
from shiradelta.io.reader import StoredTensor
from shiradelta.util.threads import map_in_threads

NOTHING: Bytes = np.zeros(0, np.uint8)


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
        return cls(positions, values, *registry.RICE_HEAD.unpack_from(source.data, start))


def residents(tensors: Sequence[tuple[Bytes, StoredTensor, TorchDecoder]]) -> list[Resident]:
    """The sections of (file, tensor, codec of the values on the device): where the file has them so, or new bytes."""
    found: list[Resident | None] = []
    for source, tensor, codec in tensors:
        record = tensor.record
        (at, size, *_), (values_at, values_size, *_) = index, values = record.index, record.values
        as_stored = (record.index_codec, record.value_codec) == (IndexId.RICE, codec.id)
        as_stored &= not (index.zstd or values.zstd)
        pair = SectionPart(source, at, at + size), SectionPart(source, values_at, values_at + values_size)
        found.append(Resident.of(*pair) if as_stored or not record.nnz else None)
    new = [one for one, kept in zip(tensors, found, strict=True) if kept is None]
    made = iter(map_in_threads(lambda one: Resident.of(_index(one[0], one[1]), _values(*one)), new))
    return [kept or next(made) for kept in found]


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
