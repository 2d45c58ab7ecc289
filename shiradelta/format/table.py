"""The table of a file as columns; a record is made when it is asked for (spec/FORMAT.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.operations import OPERATIONS, Operation
from shiradelta.format.record import Record, Section, needs_base
from shiradelta.format.registry import Flag

# Flags as plain integers: tests on an IntFlag take a fifth of the time that parsing a record does.
_BASE, _RESULT = int(Flag.BASE_FINGERPRINT), int(Flag.RESULT_FINGERPRINT)
_INDEX_ZSTD, _VALUES_ZSTD = int(Flag.INDEX_ZSTD), int(Flag.VALUES_ZSTD)
#: Makes a NamedTuple from all of its fields in half the time.
_new = tuple.__new__
#: `registry.RECORD` for NumPy.
ROW = np.dtype(
    [
        *[("name_offset", "<u4"), ("name_size", "<u2"), ("rank", "u1"), ("dtype", "u1"), ("operation", "u1")],
        *[("index_codec", "u1"), ("value_codec", "u1"), ("flags", "u1"), ("reserved", "<u4"), ("nnz", "<u8")],
        *[("base_fingerprint", "<u8"), ("result_fingerprint", "<u8")],
        *[("index_at", "<u8"), ("index_stored", "<u8"), ("index_decoded", "<u8")],
        *[("values_at", "<u8"), ("values_stored", "<u8"), ("values_decoded", "<u8")],
        *[("index_crc", "<u4"), ("values_crc", "<u4"), ("dims", "<u8", (registry.MAX_RANK,))],
    ]
)
#: The columns that tell where the sections of a tensor are, and their bytes.
SECTIONS = ("index_at", "index_stored"), ("values_at", "values_stored")
assert ROW.itemsize == registry.RECORD_SIZE
_AXES = np.arange(registry.MAX_RANK)


class Table(Sequence[Record]):
    """The records of a file, in the order of its names, which a file has once each.

    Args:
        table: TABLE; checked, as NAMES is.
        names: NAMES.
        records: the records, where they were made already.

    Attributes:
        rows: the fields of all records, by the names of `ROW`; a structured array [tensors].

    Raises:
        KeyError: a record has an id that is unknown here.
    """

    def __init__(self, table: bytes, names: bytes, records: Sequence[Record] | None = None) -> None:
        self._table, self._names = table, names
        self.rows: NDArray[Any] = np.frombuffer(self._table, ROW)
        self._made: list[Record | None] = [None] * self.rows.size if records is None else [*records]
        for ids, known in (
            (self._ids("dtype"), registry.DTYPE_OF_ID),
            (self._ids("operation"), OPERATIONS.by_id),
            (self.index_codecs, INDEX_CODECS.by_id),
            (self.value_codecs, VALUE_CODECS.by_id),
        ):
            for own in ids:
                known[own]

    def _ids(self, column: str) -> frozenset[int]:
        return frozenset(self.rows[column].tobytes())  # a byte each

    @cached_property
    def index_codecs(self) -> frozenset[int]:
        """Ids of the index codecs in use."""
        return self._ids("index_codec") - {registry.IndexId.NONE}

    @cached_property
    def value_codecs(self) -> frozenset[int]:
        """Ids of the value codecs in use."""
        return self._ids("value_codec") - {registry.ValueId.NONE}

    @cached_property
    def operations(self) -> list[Operation]:
        """The operations in use."""
        return [OPERATIONS.by_id[own] for own in sorted(self._ids("operation"))]

    @cached_property
    def names(self) -> list[str]:
        """The tensors' names."""
        starts = self.rows["name_offset"].tolist()
        ends = (self.rows["name_offset"] + self.rows["name_size"]).tolist()
        if self._names.isascii():
            every = self._names.decode()
            return [every[start:end] for start, end in zip(starts, ends, strict=True)]
        return [self._names[start:end].decode() for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name -> number."""
        return dict(zip(self.names, range(len(self)), strict=True))

    @cached_property
    def nnz(self) -> NDArray[np.int64]:
        """Nonzeros of each tensor."""
        return self.rows["nnz"].astype(np.int64)

    @cached_property
    def numel(self) -> NDArray[np.int64]:
        """Elements of each tensor."""
        dims: NDArray[np.uint64] = np.where(self.rows["rank"][:, None] > _AXES, self.rows["dims"], 1)
        numel: NDArray[np.int64] = dims.prod(axis=1).astype(np.int64)
        return numel

    @cached_property
    def zstd(self) -> NDArray[np.bool_]:
        """For each tensor, whether a section of it is compressed."""
        return self.rows["flags"] & (_INDEX_ZSTD | _VALUES_ZSTD) != 0  # type: ignore[no-any-return]

    @cached_property
    def needs_base(self) -> NDArray[np.bool_]:
        """For each tensor, whether only the base's elements tell positions or values."""
        found = np.zeros(len(self), np.bool_)
        codecs = self.rows["index_codec"], self.rows["value_codec"]
        for pair in set(zip(*(column.tobytes() for column in codecs), strict=True)):
            if needs_base(*pair):
                found |= (codecs[0] == pair[0]) & (codecs[1] == pair[1])
        return found

    def named(self, name: str) -> Record:
        """The record of a tensor.  Raises KeyError where there is no such name."""
        return self[self.numbers[name]]

    def unpacked_size(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the sections that are stored as zstd, when they are decompressed; of tensors of names, or of all."""
        if not self.zstd.any():
            return 0
        return sum(record.unpacked_size for record in (self if names is None else map(self.named, names)))

    @property
    def target_key(self) -> bytes:
        """The same for all files whose tensors have the same names, shapes, dtypes and operations."""
        columns = [self.rows[name].tobytes() for name in ("name_size", "rank", "dtype", "operation", "dims")]
        return b"".join([self._names, *columns])

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, number: int) -> Record: ...
    @overload
    def __getitem__(self, number: slice) -> list[Record]: ...
    def __getitem__(self, number: int | slice) -> Record | list[Record]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        found = self._made[number]
        if found is None:
            number %= len(self)
            fields = registry.RECORD.unpack_from(self._table, number * registry.RECORD_SIZE)
            found = self._made[number] = record_of(self.names[number], fields[2:])
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and (self._table, self._names) == (other._table, other._names)

    def __hash__(self) -> int:
        return hash((self._table, self._names))


def record_of(name: str, fields: Sequence[int]) -> Record:
    """A record from its fields behind those of the name, unchecked.

    Raises:
        KeyError: the dtype or the operation is unknown.
    """
    rank, dtype, op, index_codec, value_codec, flags, _, nnz, base, result = fields[:10]
    index_at, index_stored, index_size, values_at, values_stored, values_size, index_crc, values_crc = fields[10:18]
    index = _new(Section, (index_at, index_stored, index_size, index_crc, flags & _INDEX_ZSTD != 0))
    values = _new(Section, (values_at, values_stored, values_size, values_crc, flags & _VALUES_ZSTD != 0))
    every = (
        name,
        tuple(fields[18 : 18 + rank]),
        registry.DTYPE_OF_ID[dtype],
        OPERATIONS.by_id[op],
        index_codec,
        value_codec,
        nnz,
        base if flags & _BASE else None,
        result if flags & _RESULT else None,
        index,
        values,
    )
    return _new(Record, every)
