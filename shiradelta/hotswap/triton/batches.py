"""Which tensors of a file that is read with its base are decoded together, and their checksums meanwhile."""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.errors import FormatError
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.format.header import crc32
from shiradelta.format.record import Section
from shiradelta.hotswap.from_base import TorchFromBase
from shiradelta.hotswap.on_device import checked_values, resident_on_base
from shiradelta.hotswap.resident import Resident, SectionPart, SectionParts, stored
from shiradelta.hotswap.triton.on_base import TensorOnBase, resident_batch
from shiradelta.io.reader import StoredTensor
from shiradelta.util.threads import meanwhile

Tensor = torch.Tensor
#: Bytes of memory that a nonzero and an element take meanwhile, about; the most of a batch, and its share of what is
#: free on a device that has more.
_NONZERO_ROOM, _ELEMENT_ROOM, _ROOM, _SHARE = 80, 0.5, 2 << 30, 0.25
#: Threads that look at checksums meanwhile: more would keep the one that decodes from the interpreter's lock.
_CHECKERS = 4


class ToRead(NamedTuple):
    """A tensor that is read with its base only.

    Attributes:
        source: the file.
        tensor: the tensor.
        base: all elements' bits, flat, in torch's integers.
        codec: that of the values on the device.
    """

    source: Bytes
    tensor: StoredTensor
    base: Tensor
    codec: TorchDecoder

    @property
    def is_alike(self) -> bool:
        """Whether it is read together with others: its base tells its positions."""
        record = self.tensor.record
        given = self.base.numel(), self.base.element_size()
        known = given == (record.numel, record.element_size)
        return known and record.index_codec == FROM_BASE.id and self.room <= self.limit

    @property
    def sections(self) -> tuple[Section, ...]:
        """Those that are read on the device."""
        record = self.tensor.record
        return (record.index, record.values)[: 1 + (record.value_codec == ULP_FROM_BASE.id)]

    @property
    def room(self) -> int:
        """Bytes of memory that it takes in a batch, about."""
        record = self.tensor.record
        return _NONZERO_ROOM * record.nnz + int(_ELEMENT_ROOM * record.numel) + record.unpacked_size

    @property
    def limit(self) -> int:
        """The most that it may take."""
        return self.tensor.limit


#: Copies sections into one buffer on the device: (the buffer, where each of them starts).
Upload = Callable[[SectionParts], tuple[Tensor, NDArray[np.int64]]]


def residents_together(tensors: Sequence[ToRead], codec: TorchFromBase, upload: Upload) -> list[Resident] | None:
    """The sections of tensors as the device keeps them; None if one of them is damaged, or has another base.

    `resident_on_base` tells which, and reads those that are not alike.

    Raises:
        FormatError: one that is not alike is damaged, or its values are.
        LimitError: it takes too much memory.
    """
    alike = [number for number, each in enumerate(tensors) if each.is_alike]
    made = _batches([tensors[number] for number in alike], upload)
    if made is None:
        return None
    found = dict(zip(alike, made, strict=True))
    result = []
    for number, each in enumerate(tensors):
        source, tensor, base, values_codec = each
        own = found.get(number)
        if own is None:
            own = resident_on_base(source, tensor, base, codec, values_codec)
        elif tensor.record.value_codec != ULP_FROM_BASE.id:
            own = own._replace(values=checked_values(source, tensor, values_codec))
        result.append(own)
    return result


def _batches(tensors: Sequence[ToRead], upload: Upload) -> list[Resident] | None:
    """The residents of tensors that are alike, but for values that need no base."""
    sections = [(each.source, section) for each in tensors for section in each.sections]
    damaged: list[Section] = []

    def check(some: Sequence[tuple[Bytes, Section]]) -> None:
        for source, section in some:
            if crc32(source[section.offset : section.offset + section.stored]) != section.crc:
                damaged.append(section)

    found: dict[int, Resident] = {}
    try:
        given, buffer = uploaded(tensors, upload)
        with meanwhile(check, [sections[number::_CHECKERS] for number in range(min(_CHECKERS, len(sections)))]):
            for batch in _cut(tensors):
                made = resident_batch([given[number] for number in batch], buffer)
                if made is None:
                    return None
                found.update(zip(batch, made, strict=True))
        if damaged:
            return None
    except (FormatError, torch.OutOfMemoryError):
        return None
    return [found[number] for number in range(len(tensors))]


def uploaded(tensors: Sequence[ToRead], upload: Upload) -> tuple[list[TensorOnBase], Tensor]:
    """(what is read with their bases, the buffer that has its sections)."""
    parts = []
    for source, tensor, *_ in tensors:
        record = tensor.record
        parts.append(stored(source, record.index))
        is_read = record.value_codec == ULP_FROM_BASE.id
        parts.append(stored(source, record.values) if is_read else SectionPart(source, 0, 0))
    buffer, where = upload(SectionParts.of(parts))
    starts = where.tolist()
    contents: list[Bytes] = [np.asarray(part.source)[part.start : part.stop] for part in parts]
    given = []
    for number, (_, tensor, base, _) in enumerate(tensors):
        record, (index, values) = tensor.record, contents[2 * number : 2 * number + 2]
        at, values_at = starts[2 * number : 2 * number + 2]
        shifts = values if record.value_codec == ULP_FROM_BASE.id else None
        given.append(TensorOnBase(record.nnz, record.numel, base, index, at, shifts, values_at))
    return given, buffer[: buffer.numel() // 4 * 4]  # damaged sections may end anywhere


def _cut(tensors: Sequence[ToRead]) -> Iterator[list[int]]:
    """Their numbers in batches of elements of one size, within the limits of memory."""
    most = _room(tensors[0].base.device) if tensors else 0
    for size in sorted({each.base.element_size() for each in tensors}):
        batch: list[int] = []
        room = 0
        for number, each in enumerate(tensors):
            if each.base.element_size() != size:
                continue
            if batch and room + each.room > most:
                yield batch
                batch, room = [], 0
            batch.append(number)
            room += each.room
        if batch:
            yield batch


def _room(device: torch.device) -> int:
    """The most bytes of memory that a batch should take there."""
    if device.type != "cuda":
        return _ROOM
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_ROOM, int(_SHARE * (torch.cuda.mem_get_info(device)[0] + kept)))
