"""A tensor's record in the table of a file, and which of its fields go together (spec/FORMAT.md, section 3)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from shiradelta.format import registry
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import IndexCodec, ValueCodec
from shiradelta.format.operations import OPERATIONS, Operation
from shiradelta.format.registry import IndexId, ValueId

_ALIGNMENT = registry.SECTION_ALIGNMENT


class Section(NamedTuple):
    """Offset, sizes in bytes and checksum of a section."""

    offset: int
    stored: int
    decoded: int
    crc: int
    zstd: bool = False

    def at(self, offset: int) -> Section:
        """The same section somewhere else."""
        return Section(offset, self.stored, self.decoded, self.crc, self.zstd)

    @property
    def end(self) -> int:
        """Offset of the next section."""
        return -(-(self.offset + self.stored) // _ALIGNMENT) * _ALIGNMENT


class Record(NamedTuple):
    """One tensor's row of the table."""

    name: str
    shape: tuple[int, ...]
    dtype: registry.DType
    operation: Operation
    index_codec: int
    value_codec: int
    nnz: int
    base_fingerprint: int | None
    result_fingerprint: int | None
    index: Section  # type: ignore[assignment]  # tuples have a method of this name, which nobody calls
    values: Section

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def adds(self) -> bool:
        """Whether values are added; otherwise elements are replaced."""
        return self.operation.adds

    @property
    def may_need_base(self) -> bool:
        """Whether the codecs that need the base's elements are defined for this dtype."""
        return _may_need_base(self.dtype)

    @property
    def needs_base(self) -> bool:
        """Whether only the base's elements tell positions or values."""
        return needs_base(self.index_codec, self.value_codec)

    @property
    def element_size(self) -> int:
        """Bytes of an element; 0 where the dtype is unspecified."""
        return self.dtype.size

    @property
    def unpacked_size(self) -> int:
        """Bytes of the sections that are stored as zstd, when they are decompressed."""
        index, values = self.index, self.values
        return (index.decoded if index.zstd else 0) + (values.decoded if values.zstd else 0)

    @property
    def decoded_size(self) -> int:
        """Bytes of positions and values in memory, 8 and the value's for each nonzero, and of what they come from."""
        return self.nnz * (8 + (4 if self.adds else self.element_size)) + self.unpacked_size

    @property
    def minor(self) -> int:
        """The minor version that defines all that this record uses."""
        if self.nnz == 0:
            return self.operation.minor
        index, values = INDEX_CODECS.by_id[self.index_codec], VALUE_CODECS.by_id[self.value_codec]
        return max(self.operation.minor, index.minor, values.minor)

    @property
    def index_codec_name(self) -> str:
        """The registry's name of `index_codec`, which is an id."""
        return INDEX_CODECS.by_id[self.index_codec].name if self.index_codec else IndexId.NONE.name

    @property
    def value_codec_name(self) -> str:
        """The registry's name of `value_codec`, which is an id."""
        return VALUE_CODECS.by_id[self.value_codec].name if self.value_codec else ValueId.NONE.name


def combination_problem(record: Record) -> str | None:
    """Which fields of a record contradict each other (FORMAT.md, 3.1); None if none do."""
    return _problem(
        record.operation.id,
        record.dtype.id,
        INDEX_CODECS.by_id.get(record.index_codec),
        VALUE_CODECS.by_id.get(record.value_codec),
        record.nnz == 0,
        record.nnz == record.numel,
        record.base_fingerprint is not None,
        record.result_fingerprint is not None,
    )


@lru_cache(maxsize=256)  # a file has few kinds of tensors
def _problem(
    operation_id: int,
    dtype_id: int,
    index: IndexCodec | None,
    values: ValueCodec | None,
    empty: bool,
    whole: bool,
    has_base: bool,
    has_result: bool,
) -> str | None:
    """`combination_problem` of all tensors of a kind; an id without a codec is NONE's."""
    operation, dtype = OPERATIONS.by_id[operation_id], registry.DTYPE_OF_ID[dtype_id]
    index_name = IndexId.NONE.name if index is None else index.name
    codecs = f"{index_name} and {ValueId.NONE.name if values is None else values.name}"
    if (index is None) != empty or (values is None) != empty:
        return f"{'no' if empty else 'some'} nonzeros in {codecs}"
    if index_name == IndexId.ALL.name and not whole:
        return "ALL without all elements"
    fits = (
        dtype.name in operation.dtypes
        and (values is None or (values.adds, values.shifts) == (operation.adds, operation.shifts))
        and (empty or operation.in_result)
        and (not operation.creates or (whole and (empty or index_name == IndexId.ALL.name)))
    )
    fits &= _may_need_base(dtype) or not any(codec is not None and codec.needs_base for codec in (index, values))
    if not fits:
        return f"{operation.title} of {dtype.name} with {codecs}"
    unspecified = dtype is registry.UNSPECIFIED
    for present, never in (
        (has_base, unspecified or not operation.in_base),
        (has_result, unspecified or not operation.in_result),
    ):
        if present and never:
            return f"a fingerprint on {operation.title} of {dtype.name}"
    return None


@lru_cache(maxsize=256)
def needs_base(index_codec: int, value_codec: int) -> bool:
    """Whether only the base's elements tell what is in sections of these codecs."""
    codecs = INDEX_CODECS.by_id.get(index_codec), VALUE_CODECS.by_id.get(value_codec)
    return any(codec is not None and codec.needs_base for codec in codecs)


def _may_need_base(dtype: registry.DType) -> bool:
    return registry.ORDERED.get(dtype.name) is registry.Order.SIGN_AND_MAGNITUDE
