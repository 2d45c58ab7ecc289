"""The form in which a device keeps a patch's sections, decompressed: RICE, and values in a codec that it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.backends.choose import AUTO, choose
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.format.record import Section
from shiradelta.format.registry import IndexId
from shiradelta.format.table import SECTIONS
from shiradelta.format.zstd import unzstd
from shiradelta.hotswap.fits import FitColumns
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.util.threads import map_in_threads

NOTHING: Bytes = np.zeros(0, np.uint8)
_RICE = int(IndexId.RICE)
#: `registry.RICE_HEAD` for NumPy.
_HEAD = np.dtype([("k", "u1"), ("zero", "u1", (7,)), ("unary_bits", "<u8")])
assert _HEAD.itemsize == registry.RICE_HEAD.size


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


class SectionParts(NamedTuple):
    """Sections, as columns.

    Attributes:
        sources: what they are in.
        which: the number of each one's source, int64 [n].
        starts: the first byte of each there, int64 [n].
        stops: the byte after its last, int64 [n].
    """

    sources: Sequence[Bytes | torch.Tensor]
    which: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[SectionPart]) -> SectionParts:
        """The columns of sections."""
        sources = list({id(part.source): part.source for part in parts}.values())
        number_of = {id(source): number for number, source in enumerate(sources)}
        rows = [(number_of[id(source)], start, stop) for source, start, stop in parts]
        return cls(sources, *np.array(rows, np.int64).reshape(-1, 3).T)

    def joined(self, gap: int) -> tuple[list[SectionPart], NDArray[np.int64]]:
        """(neighbours in one part, where they are padded to multiples of `gap`; the number of that of each)."""
        before: Any = self.stops[:-1]  # functions of one number take a column
        begins = np.ones(self.which.size, np.bool_)
        begins[1:] = (self.which[1:] != self.which[:-1]) | (self.starts[1:] != registry.align(before, gap))
        first = np.flatnonzero(begins)
        last = np.append(first[1:], begins.size) - 1 if first.size else first
        rows = self.which[first].tolist(), self.starts[first].tolist(), self.stops[last].tolist()
        parts = [SectionPart(self.sources[which], start, stop) for which, start, stop in zip(*rows, strict=True)]
        return parts, np.cumsum(begins) - 1


class Residents(NamedTuple):
    """The sections of patches, and what the heads of their indices say, as columns.

    Attributes:
        parts: the positions and the values of each patch, by turns [2 n].
        k: RICE's, int64 [n].
        unary_bits: RICE's, int64 [n].
    """

    parts: SectionParts
    k: NDArray[np.int64]
    unary_bits: NDArray[np.int64]

    @classmethod
    def stored(cls, source: Bytes, fits: FitColumns) -> Residents:
        """Those that are in a file as the device keeps them."""
        rows = fits.rows
        starts = np.column_stack([rows[at] for at, _ in SECTIONS]).astype(np.int64)
        stops = starts + np.column_stack([rows[size] for _, size in SECTIONS]).astype(np.int64)
        parts = SectionParts([source], np.zeros(starts.size, np.int64), starts.reshape(-1), stops.reshape(-1))
        heads = np.zeros(len(fits), _HEAD)
        some = np.flatnonzero(rows["index_stored"])  # a patch without nonzeros has no head
        heads.view(np.uint8).reshape(-1, _HEAD.itemsize)[some] = source[starts[some, :1] + np.arange(_HEAD.itemsize)]
        # A section may turn out to be damaged: what is planned of it meanwhile must not take all memory.
        unary_bits = np.minimum(heads["unary_bits"], 8 * rows["index_stored"])
        return cls(parts, heads["k"].astype(np.int64), unary_bits.astype(np.int64))

    @classmethod
    def of(cls, every: Sequence[Resident]) -> Residents:
        """The columns of these."""
        heads = np.array([one[2:] for one in every], np.int64).reshape(-1, 2).T
        return cls(SectionParts.of([part for one in every for part in one[:2]]), *heads)

    @classmethod
    def together(cls, every: Sequence[Residents], order: NDArray[np.int64]) -> Residents:
        """Several, one after the other, and then in this order."""
        if len(every) == 1:
            return every[0]
        before = np.cumsum([0, *(len(one.parts.sources) for one in every)]).tolist()
        which = np.concatenate([one.parts.which + at for one, at in zip(every, before, strict=False)])
        both = (2 * order[:, None] + [0, 1]).reshape(-1)
        starts, stops = (np.concatenate([getattr(one.parts, name) for one in every]) for name in ("starts", "stops"))
        sources = [source for one in every for source in one.parts.sources]
        k, unary_bits = (np.concatenate([getattr(one, name) for one in every])[order] for name in ("k", "unary_bits"))
        return cls(SectionParts(sources, which[both], starts[both], stops[both]), k, unary_bits)


def residents(source: Bytes, delta: Delta, fits: FitColumns, codecs: Sequence[TorchDecoder]) -> Residents:
    """The sections of tensors that need no base: where the file has them so, or new bytes.

    Args:
        source: the file.
        delta: the same, open.
        fits: the tensors.
        codecs: those of each one's values on the device.
    """
    rows = fits.rows
    ids = np.array([codec.id for codec in codecs], np.int64)
    as_stored = (rows["index_codec"] == _RICE) & (rows["value_codec"] == ids) & ~fits.table.zstd[fits.numbers]
    as_stored |= fits.nonzeros == 0
    if as_stored.all():
        return Residents.stored(source, fits)
    kept, others = np.flatnonzero(as_stored), np.flatnonzero(~as_stored)
    tensors = [(source, delta[delta.table.names[number]]) for number in fits.numbers[others].tolist()]
    made = map_in_threads(
        lambda one: Resident.of(_index(*one[0]), _values(*one[0], one[1])),
        [(tensor, codecs[number]) for tensor, number in zip(tensors, others.tolist(), strict=True)],
    )
    every = [Residents.stored(source, fits.some(kept)), Residents.of(made)]
    return Residents.together(every, np.argsort(np.concatenate([kept, others])))


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
