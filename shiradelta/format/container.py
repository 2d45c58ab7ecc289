"""Parses and builds containers: header, tensor table, names, metadata (spec/FORMAT.md, sections 2 and 3).

`parse` makes every check that needs no payload; sections are decoded by the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shiradelta.errors import ArgumentError, FormatError
from shiradelta.format import registry
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.header import Header, crc32, read_header
from shiradelta.format.operations import OPERATIONS
from shiradelta.format.packed import unpack
from shiradelta.format.record import Record, Section, combination_problem
from shiradelta.format.registry import Flag, Incompatible
from shiradelta.format.table import ROW, SECTIONS, Table, record_of

# Flags as plain integers: tests on an IntFlag take a fifth of the time that parsing a record does.
_BASE, _RESULT = int(Flag.BASE_FINGERPRINT), int(Flag.RESULT_FINGERPRINT)
_INDEX_ZSTD, _VALUES_ZSTD = int(Flag.INDEX_ZSTD), int(Flag.VALUES_ZSTD)
_FLAGS = sum(map(int, Flag))
_CONTROL = bytes([*range(0x20), 0x7F])


@dataclass(frozen=True)
class Container:
    """A file without its payload."""

    records: Table
    metadata: Mapping[str, str]
    digest: bytes
    data: Bytes  # the file, unpacked
    minor: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)  # part -> its bytes unpacked, but the file's own
    packed: bool = False


def _tables(header: Header) -> list[Section]:
    """TABLE, NAMES, METADATA and EXTENSION, which follow the header in this order."""
    sections = []
    cursor = registry.HEADER_SIZE
    for size, crc in zip(header.whole_sizes, header.crcs, strict=True):
        sections.append(Section(cursor, size, size, crc))
        cursor = sections[-1].end
    return sections


def tables_end(header: Header) -> int:
    """Where the tensors' sections begin in a file that is not packed; beyond the file's end if it is damaged."""
    return _tables(header)[-1].end


def between_sections(table: bytes, size: int) -> NDArray[np.int64]:
    """Where a file of a size has bytes between sections, by a table that may be damaged."""
    rows = np.frombuffer(table, ROW, len(table) // registry.RECORD_SIZE)
    ends = np.concatenate([rows[at] + rows[stored] for at, stored in SECTIONS])
    ends = ends[ends < size].astype(np.int64)
    counts = np.minimum(-ends % registry.SECTION_ALIGNMENT, size - ends)
    firsts = np.repeat(ends - np.cumsum(counts) + counts, counts)
    return firsts + np.arange(firsts.size)


def _check_padding(data: memoryview, start: int, end: int) -> None:
    """Checks that bytes between sections are zero."""
    if start < end and bytes(data[start:end]).strip(b"\0"):
        raise FormatError("padding_not_zero", "between sections", offset=start)


def parse(data: Bytes, most: int | None = None, accepts: Callable[[Bytes], bool] | None = None) -> Container:
    """Reads a whole file and checks everything but the payload.

    Args:
        data: the file's bytes.
        most: the most bytes of memory that a packed file may take.
        accepts: makes the same checks faster; the bytes must not change from then on.  What it accepts is not checked
            again here; what it refuses is, to say what is wrong.

    Raises:
        FormatError: in the order and with the reasons of FORMAT.md.
        LimitError: a packed file takes more.
    """
    header, packed_size = read_header(data), None
    if header.packed:
        data, packed_size = unpack(data, header, most), data.size
        header = read_header(data)
    sections = _tables(header)
    accepted = accepts is not None and accepts(data)
    if not accepted:
        _check_tables(data, header, sections)
    # Copies: a file that is mapped may change after this.
    table, names, metadata = (data[s.offset : s.offset + s.stored].tobytes() for s in sections[:3])
    pairs = parse_metadata(metadata, sections[2].offset)
    records = None
    if accepted:
        with suppress(KeyError):  # an id that only the other reader knows
            records = Table(table, names)
    if records is None:
        zstd = bool(header.incompatible & Incompatible.ZSTD)
        records = Table(table, names, _checked_records(data.data, table, names, sections[-1].end, zstd))
    sizes = {
        "header": registry.HEADER_SIZE,
        "table": len(table) + len(names),
        "metadata": len(metadata) + sections[3].stored,
        "index": int(records.rows["index_stored"].sum()),
        "values": int(records.rows["values_stored"].sum()),
        "file": header.file_size if packed_size is None else packed_size,
    }
    return Container(records, pairs, header.digest, data, header.minor, sizes, packed_size is not None)


def _check_tables(data: Bytes, header: Header, sections: Sequence[Section]) -> None:
    """Checks the places and checksums of the sections of the whole file."""
    end = sections[-1].end
    if end > header.file_size:
        raise FormatError("section_layout", f"the table and its like end at {end} of {header.file_size} bytes")
    for section in sections:
        if crc32(data[section.offset : section.offset + section.stored]) != section.crc:
            raise FormatError("section_checksum", offset=section.offset)
        _check_padding(data.data, section.offset + section.stored, section.end)


def parse_metadata(data: bytes, offset: int) -> dict[str, str]:
    """Reads pairs of strings, whose keys must be strictly increasing."""
    pairs: dict[str, str] = {}
    at, before = 0, b""
    while at < len(data):
        head = at + registry.METADATA_PAIR.size
        if head > len(data):
            raise FormatError("bad_metadata", "a pair is cut off", offset=offset + at)
        key_size, value_size = registry.METADATA_PAIR.unpack_from(data, at)
        key, end = data[head : head + key_size], head + key_size + value_size
        if end > len(data) or key <= before:
            raise FormatError("bad_metadata", "a pair is cut off, empty or out of order", offset=offset + at)
        try:
            pairs[key.decode()] = data[head + key_size : end].decode()
        except UnicodeDecodeError:
            raise FormatError("bad_metadata", "not UTF-8", offset=offset + at) from None
        at, before = end, key
    return pairs


def build_metadata(pairs: Mapping[str, str]) -> bytes:
    """The inverse of `parse_metadata`."""
    try:
        encoded = sorted((key.encode(), value.encode()) for key, value in pairs.items())
    except UnicodeEncodeError as error:
        raise ArgumentError(f"metadata {error.object!r} are not Unicode text") from None
    return b"".join(registry.METADATA_PAIR.pack(len(k), len(v)) + k + v for k, v in encoded)


def _checked_records(data: memoryview, table: bytes, names: bytes, cursor: int, zstd: bool) -> list[Record]:
    """The records of a table; `cursor` is where its first section begins."""
    records: list[Record] = []
    name_end, before = 0, b""
    for number, (name_offset, name_size, *fields) in enumerate(registry.RECORD.iter_unpack(table)):
        at = registry.HEADER_SIZE + number * registry.RECORD_SIZE
        raw = names[name_offset : name_offset + name_size]
        try:
            if name_offset != name_end or name_offset + name_size > len(names):
                raise FormatError("name_layout", f"name of record {number}")
            name = _parse_name(raw, before)
        except FormatError as error:
            error.offset = at
            raise
        try:
            record = _checked_record(name, fields, data, cursor, zstd)
        except FormatError as error:
            error.tensor = name
            if error.offset is None:
                error.offset = at
            raise
        records.append(record)
        name_end, before, cursor = name_end + name_size, raw, record.values.end
    if name_end != len(names):
        raise FormatError("name_layout", f"{len(names) - name_end} bytes behind the last name")
    if cursor != data.nbytes:
        raise FormatError("section_layout", f"sections end at {cursor} of {data.nbytes} bytes")
    return records


def check_name(raw: bytes) -> str:
    """Decodes a tensor's name, and checks that the format allows it."""
    if not 0 < len(raw) <= registry.MAX_NAME_SIZE:
        raise FormatError("bad_name", f"{len(raw)} bytes")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise FormatError("bad_name", "not UTF-8") from None
    if raw.translate(None, _CONTROL) != raw:
        raise FormatError("bad_name", "control character")
    return name


def _parse_name(raw: bytes, before: bytes) -> str:
    name = check_name(raw)
    if raw == before:
        raise FormatError("duplicate_name", repr(name))
    if raw < before:
        raise FormatError("name_order", repr(name))
    return name


def _checked_record(name: str, fields: Sequence[int], data: memoryview, cursor: int, zstd: bool) -> Record:
    rank, dtype_id, op_id, index_id, value_id, flag_bits, reserved, nnz, base_fingerprint, result_fingerprint = fields[
        :10
    ]
    if reserved or flag_bits & ~_FLAGS:
        raise FormatError("reserved_not_zero", "in a record")
    if dtype_id not in registry.DTYPE_OF_ID:
        raise FormatError("unknown_dtype", f"id {dtype_id}")
    if op_id not in OPERATIONS.by_id:
        raise FormatError("unknown_op", f"id {op_id}")
    if index_id and index_id not in INDEX_CODECS.by_id:
        raise FormatError("unknown_index_codec", f"id {index_id}")
    if value_id and value_id not in VALUE_CODECS.by_id:
        raise FormatError("unknown_value_codec", f"id {value_id}")
    numel = _check_shape(rank, fields[18:])
    if nnz > numel:
        raise FormatError("bad_count", f"{nnz} nonzeros, {numel} elements")
    record = record_of(name, fields)
    problem = combination_problem(record)
    if problem:
        raise FormatError("bad_combination", problem)
    if (base_fingerprint and not flag_bits & _BASE) or (result_fingerprint and not flag_bits & _RESULT):
        raise FormatError("reserved_not_zero", "a fingerprint without its flag")
    if nnz:
        index_ok = INDEX_CODECS.by_id[index_id].size_is_possible(record.index.decoded, nnz, numel)
        values_ok = VALUE_CODECS.by_id[value_id].size_is_possible(record.values.decoded, nnz, record.element_size)
    else:
        index_ok, values_ok = record.index.decoded == 0, record.values.decoded == 0
    _check_section(record.index, cursor, data, zstd, index_ok)
    _check_section(record.values, record.index.end, data, zstd, values_ok)
    return record


def _check_shape(rank: int, dims: Sequence[int]) -> int:
    """Checks a shape; returns the number of elements."""
    shape = dims[:rank]
    if rank > registry.MAX_RANK or any(dims[rank:]):
        raise FormatError("bad_shape", f"rank {rank}")
    # Python's integers do not overflow; with a zero among the dims the product is 0 whatever the others are.
    numel = math.prod(shape)
    if max(dims) > registry.MAX_NUMEL or numel > registry.MAX_NUMEL:
        raise FormatError("bad_shape", f"{list(shape)}")
    return numel


def _check_section(section: Section, cursor: int, data: memoryview, zstd: bool, size_ok: bool) -> None:
    if section.offset != cursor or section.end > data.nbytes:
        raise FormatError("section_layout", f"a section of {section.stored} bytes at {section.offset}")
    if not section.zstd and section.decoded != section.stored:
        raise FormatError("section_layout", "stored and decoded size differ", offset=section.offset)
    if section.zstd and (not zstd or section.stored == 0 or section.decoded == 0):
        raise FormatError("bad_combination", "zstd without its feature bit, or empty")
    if section.stored == 0 and section.crc:
        raise FormatError("section_checksum", "of an empty section", offset=section.offset)
    if section.zstd and section.decoded > section.stored * registry.MAX_ZSTD_RATIO:
        raise FormatError("zstd_ratio", f"{section.decoded} from {section.stored} bytes", offset=section.offset)
    if not size_ok:
        raise FormatError("bad_size", f"{section.decoded} bytes", offset=section.offset)
    _check_padding(data, section.offset + section.stored, section.end)


def front(
    records: Iterable[Record], metadata: Mapping[str, str], digest: bytes, file_size: int
) -> tuple[Header, list[bytes]]:
    """The header, and TABLE, NAMES, METADATA and EXTENSION; the records' offsets are final.

    The minor version is the lowest that defines all that the records use.
    """
    records = tuple(records)
    names = [record.name.encode() for record in records]
    table = bytearray()
    offset = 0
    for record, name in zip(records, names, strict=True):
        table += _build_record(record, offset, len(name))
        offset += len(name)
    parts = [bytes(table), b"".join(names), build_metadata(metadata), b""]
    zstd = any(record.index.zstd or record.values.zstd for record in records)
    header = Header(
        minor=max((record.minor for record in records), default=0),
        tensor_count=len(records),
        incompatible=Incompatible.ZSTD if zstd else 0,
        compatible=0,
        file_size=file_size,
        sizes=(len(parts[1]), len(parts[2]), len(parts[3])),
        crcs=(crc32(parts[0]), crc32(parts[1]), crc32(parts[2]), crc32(parts[3])),
        digest=digest,
    )
    return header, parts


def build(records: Iterable[Record], metadata: Mapping[str, str], digest: bytes, file_size: int) -> bytes:
    """Everything before the first payload section; arguments are those of `front`."""
    header, parts = front(records, metadata, digest, file_size)
    return b"".join((header.to_bytes(), *map(pad_section, parts)))


def pad_section(section: bytes) -> bytes:
    """Pads a section with zeros up to the next one."""
    return section + bytes(-len(section) % registry.SECTION_ALIGNMENT)


def payload_start(tensor_count: int, names_size: int, metadata: Mapping[str, str]) -> int:
    """Offset of the first payload section."""
    sizes = (tensor_count * registry.RECORD_SIZE, names_size, len(build_metadata(metadata)))
    return registry.HEADER_SIZE + sum(registry.align(size, registry.SECTION_ALIGNMENT) for size in sizes)


def _build_record(record: Record, name_offset: int, name_size: int) -> bytes:
    flags = (
        _BASE * (record.base_fingerprint is not None)
        | _RESULT * (record.result_fingerprint is not None)
        | _INDEX_ZSTD * record.index.zstd
        | _VALUES_ZSTD * record.values.zstd
    )
    dims = record.shape + (0,) * (registry.MAX_RANK - len(record.shape))
    return registry.RECORD.pack(
        name_offset,
        name_size,
        len(record.shape),
        record.dtype.id,
        record.operation.id,
        record.index_codec,
        record.value_codec,
        flags,
        0,
        record.nnz,
        record.base_fingerprint or 0,
        record.result_fingerprint or 0,
        record.index.offset,
        record.index.stored,
        record.index.decoded,
        record.values.offset,
        record.values.stored,
        record.values.decoded,
        record.index.crc,
        record.values.crc,
        *dims,
    )
