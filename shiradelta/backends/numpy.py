"""The reference backend: decodes and applies in NumPy; all other backends must give the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np

from shiradelta.backends.protocols import Backend, Decoder
from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.header import crc32
from shiradelta.format.record import Record, Section
from shiradelta.format.table import Table
from shiradelta.format.zstd import unzstd
from shiradelta.util.arrays import WINDOW, aligned, ranges


class NumpyDecoder(Decoder):
    """Decodes with the codecs' NumPy implementations."""

    def __init__(self, data: Bytes, file: str | None, records: Table) -> None:
        self._data, self._file, self.records = data, file, records

    def positions(self, record: Record) -> Positions:
        with self._context(record, record.index):
            data = self._section(record.index)
            return INDEX_CODECS.by_id[record.index_codec].decode(data, record.nnz, record.shape)

    def bits(self, record: Record) -> Array:
        return np.concatenate(list(self.bits_windows(record)))

    def section(self, record: Record, which: Section, checked: bool = False) -> Bytes:
        with self._context(record, which):
            return self._section(which, not checked) if which.stored else self._data[:0]

    def position_windows(self, record: Record) -> Iterator[Positions]:
        with self._context(record, record.index):
            data = self._section(record.index)
            yield from INDEX_CODECS.by_id[record.index_codec].windows(data, record.nnz, record.shape)

    def bits_windows(self, record: Record) -> Iterator[Array]:
        with self._context(record, record.values):
            data = self._section(record.values)
            codec = VALUE_CODECS.by_id[record.value_codec]
            codec.check(data, record.nnz, record.element_size)
            for start, stop in ranges(record.nnz):
                values = codec.decode(data, record.nnz, record.element_size, start, stop)
                yield values.view("<u4") if record.adds else values

    def between(self, record: Record, start: int, stop: int) -> tuple[Positions, Array]:
        with self._context(record, record.index):
            data = self._section(record.index, whole=False)
            codec = INDEX_CODECS.by_id[record.index_codec]
            first, positions = codec.decode_between(data, record.nnz, record.shape, start, stop)
        with self._context(record, record.values), np.errstate(over="ignore", invalid="ignore"):
            data = self._section(record.values, whole=False)
            values = VALUE_CODECS.by_id[record.value_codec].decode(
                data, record.nnz, record.element_size, first, first + positions.size
            )
            if record.adds and not np.all(np.isfinite(values)):
                raise FormatError("bad_value", "a value is not finite")
        return positions, values.view("<u4") if record.adds else values

    def runs(
        self, record: Record, spans: Sequence[tuple[int, int]], checked: bool = False
    ) -> list[tuple[int, Positions]]:
        if not checked:
            self.check(record)
        data, codec = self.section(record, record.index, checked=True), INDEX_CODECS.by_id[record.index_codec]
        return [codec.decode_between(data, record.nnz, record.shape, *span) for span in spans]

    def bits_from(self, record: Record, rank: int, count: int) -> Array:
        data, codec = self.section(record, record.values, checked=True), VALUE_CODECS.by_id[record.value_codec]
        values = codec.decode(data, record.nnz, record.element_size, rank, rank + count)
        return values.view("<u4") if record.adds else values

    def check(self, record: Record) -> None:
        if record.nnz:
            for _ in chain(self.position_windows(record), self.bits_windows(record)):
                pass

    def patch(self, record: Record, weight: Array, dtype: str, strength: float) -> None:
        """Applies window by window, once everything has been checked."""
        if not record.nnz:
            return
        windows: Iterable[tuple[Positions, Array]] = aligned(self.position_windows(record), self.bits_windows(record))
        if record.nnz > WINDOW:
            self.check(record)
        else:
            windows = list(windows)
        for positions, bits in windows:
            try:
                weight[positions] = arithmetic.result(record.operation, bits, weight[positions], dtype, strength)
            except DeltaError:
                raise arithmetic.out_of_range(f"tensor {record.name!r}") from None

    @contextmanager
    def _context(self, record: Record, section: Section) -> Iterator[None]:
        """Completes a codec's error with file, tensor and offset."""
        try:
            yield
        except FormatError as error:
            error.file, error.tensor, error.offset = self._file, record.name, section.offset
            raise

    def _section(self, section: Section, whole: bool = True) -> Bytes:
        """The decoded bytes of a section; checks its checksum if `whole`."""
        stored = self._data[section.offset : section.offset + section.stored]
        if whole and crc32(stored) != section.crc:
            raise FormatError("section_checksum")
        return np.frombuffer(unzstd(stored, section.decoded), np.uint8) if section.zstd else stored


def at_least(x: Float32, threshold: float) -> Positions:
    """Indices of |x| >= threshold."""
    return np.flatnonzero(np.abs(x) >= np.float32(threshold))


NUMPY = Backend("numpy", NumpyDecoder, INDEX_CODECS.by_id, VALUE_CODECS.by_id, arithmetic.fingerprint, at_least)
