"""A tensor's record in the table of a file, and which of its fields go together (spec/FORMAT.md, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from shiradelta.format import registry
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import ValueCodec
from shiradelta.format.operations import Operation
from shiradelta.format.registry import IndexId, ValueId


@dataclass(frozen=True)
class Section:
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
        return registry.align(self.offset + self.stored, registry.SECTION_ALIGNMENT)


@dataclass(frozen=True)
class Record:
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
    index: Section
    values: Section

    @cached_property
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
        return registry.ORDERED.get(self.dtype.name) is registry.Order.SIGN_AND_MAGNITUDE

    @property
    def needs_base(self) -> bool:
        """Whether only the base's elements tell positions or values."""
        codecs = INDEX_CODECS.by_id.get(self.index_codec), VALUE_CODECS.by_id.get(self.value_codec)
        return any(codec is not None and codec.needs_base for codec in codecs)

    @property
    def element_size(self) -> int:
        """Bytes of an element; 0 where the dtype is unspecified."""
        return self.dtype.size

    @property
    def unpacked_size(self) -> int:
        """Bytes of the sections that are stored as zstd, when they are decompressed."""
        return sum(section.decoded for section in (self.index, self.values) if section.zstd)

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


def _holds(codec: ValueCodec, operation: Operation) -> bool:
    """Whether a codec holds what an operation lists."""
    return (codec.adds, codec.shifts) == (operation.adds, operation.shifts)


def combination_problem(record: Record) -> str | None:
    """Which fields of a record contradict each other (FORMAT.md, 3.1); None if none do."""
    empty = record.nnz == 0
    whole = record.nnz == record.numel
    unspecified = record.dtype is registry.UNSPECIFIED
    if (record.index_codec == IndexId.NONE) != empty or (record.value_codec == ValueId.NONE) != empty:
        return f"{record.nnz} nonzeros in {record.index_codec_name} and {record.value_codec_name}"
    if record.index_codec == IndexId.ALL and not whole:
        return "ALL without all elements"
    operation = record.operation
    fits = (
        record.dtype.name in operation.dtypes
        and (empty or _holds(VALUE_CODECS.by_id[record.value_codec], operation))
        and (empty or operation.in_result)
        and (not operation.creates or (whole and (empty or record.index_codec == IndexId.ALL)))
    )
    fits &= record.may_need_base or not record.needs_base
    if not fits:
        codecs = f"{record.index_codec_name} and {record.value_codec_name}"
        return f"{operation.title} of {record.dtype.name} with {codecs}"
    for present, never in (
        (record.base_fingerprint, unspecified or not operation.in_base),
        (record.result_fingerprint, unspecified or not operation.in_result),
    ):
        if present is not None and never:
            return f"a fingerprint on {operation.title} of {record.dtype.name}"
    return None
