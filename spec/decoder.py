"""A reference reader of the shiradelta format, version 1, written from FORMAT.md and REGISTRY.md.

It follows FORMAT.md section by section and prefers clarity to speed. It reads and checks a whole
file in memory; time and memory are linear in the decoded size of the file (STRUCT sorts once).

    python spec/decoder.py FILE [BASE.safetensors ...]

prints the delta as JSON, or "refused: ..." on stderr. Only FROM_BASE and ULP_FROM_BASE look at the base.
Files with zstd are read where the package zstandard is installed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

Zstd = Callable[[bytes, int], bytes]
Base = Mapping[str, bytes]

# --- REGISTRY.md: only what is defined; every other id is refused as unknown ---

# By id, from 0: the name and the bytes of an element.
DTYPES = [
    *[("unspecified", 0), ("float32", 4), ("float16", 2), ("bfloat16", 2), ("float64", 8)],
    *[("float8_e4m3fn", 1), ("float8_e5m2", 1), ("float8_e8m0fnu", 1), ("bool", 1)],
    *[("uint8", 1), ("int8", 1), ("uint16", 2), ("int16", 2), ("uint32", 4), ("int32", 4)],
    *[("uint64", 8), ("int64", 8), ("float8_e4m3fnuz", 1), ("float8_e5m2fnuz", 1)],
    ("complex64", 8),
]
OPS = {0: "ADD", 1: "SET", 2: "ULP", 3: "NEW", 4: "DROP", 6: "REPLACE"}
INDEX_CODECS = dict(enumerate(("NONE", "RICE", "RAW", "BITMAP", "STRUCT", "ALL")))
INDEX_CODECS |= {7: "TILED", 10: "SEEDED", 11: "FROM_BASE"}
VALUE_CODECS = dict(enumerate(("NONE", "F32", "F16", "BF16", "I8", "I4", "SIGN", "BITS", "ULP")))
VALUE_CODECS[10] = "ULP_FROM_BASE"
FROM_BASE_CODECS = ("FROM_BASE", "ULP_FROM_BASE")
FEATURE_ZSTD, FEATURE_PACKED = 1 << 0, 1 << 2

MAX_TENSORS = 1048576
MAX_NAMES_SIZE = 67108864
MAX_METADATA_SIZE = 16777216
MAX_EXTENSION_SIZE = 67108864
MAX_NAME_SIZE = 1024
MAX_RANK = 8
MAX_NUMEL = 1 << 56
MAX_RICE_K = 31
MAX_STRUCT_ENTRIES = 256
MAX_TILE = 131072
MAX_TILE_FIELD = 19
MAX_CLASS_BITS = 4
MAX_BASE_CLASSES = 16
MAX_BASE_TILE = 1048576
MAX_BASE_TILE_FIELD = 22
MAX_CELLS = (1 << 32) - 1
MAX_CELL = 1 << 32
MAX_ZSTD_RATIO = 64


# --- what the reader gives back ---


class Refused(Exception):
    """The one error of this reader.

    `offset` is the place in the file, for the content of an INDEX or VALUES the section's start.
    """

    def __init__(self, reason: str, offset: int | None = None, tensor: str | None = None) -> None:
        super().__init__(reason, offset, tensor)
        self.reason = reason
        self.offset = offset
        self.tensor = tensor

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at byte {self.offset}"
        return self.reason + where + ("" if self.tensor is None else f" in tensor {self.tensor!r}")


@dataclass
class Tensor:
    """One tensor's delta; values are bit patterns: binary32 for ADD, the dtype's for SET, NEW, REPLACE.

    For ULP they are the shifts' two's complement.
    """

    name: str
    dtype: str
    op: str
    index_codec: str
    value_codec: str
    shape: tuple[int, ...]
    positions: list[int]
    values: list[int]
    base_fingerprint: int | None
    result_fingerprint: int | None


@dataclass
class Delta:
    minor: int
    digest: str
    metadata: dict[str, str]
    tensors: list[Tensor]


# --- 1. Conventions ---
# Python's integers do not overflow, so sizes are computed exactly whatever a file declares; what
# matters is that nothing is allocated or looped over before a check has bounded it.


def check(right: bool, reason: str, offset: int | None = None) -> None:
    if not right:
        raise Refused(reason, offset)


@contextmanager
def within(tensor: str, offset: int) -> Iterator[None]:
    """Adds to a refusal where it happened."""
    try:
        yield
    except Refused as refused:
        refused.tensor = tensor
        if refused.offset is None:
            refused.offset = offset
        raise


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align4(n: int) -> int:
    return ceil_div(n, 4) * 4


def align64(n: int) -> int:
    return ceil_div(n, 64) * 64


def utf8(raw: bytes, reason: str, offset: int) -> str:
    """Strict: Python refuses surrogates, overlong forms and anything above U+10FFFF."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(reason, offset) from None


def bits32(x: float) -> int:
    """The bits of fl32(x). struct rounds binary64 to nearest even, but raises on overflow."""
    try:
        return int.from_bytes(struct.pack("<f", x), "little")
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def float32(bits: int) -> float:
    """The number that 32 bits stand for; every binary32 is exact in Python's binary64."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def is_finite32(bits: int) -> bool:
    return bits & 0x7F800000 != 0x7F800000


def ones_of(bitmap: bytes) -> list[int]:
    """The indices of the one bits of a bitmap of u32 words, increasing."""
    ones = []
    for at, (word,) in enumerate(struct.iter_unpack("<I", bitmap)):
        while word:
            lowest = word & -word
            ones.append(32 * at + lowest.bit_length() - 1)
            word ^= lowest
    return ones


# --- 2. The file ---

HEADER = struct.Struct("<8sHHIQQQQQQIIII32sIIII")
MAGIC = b"\x89SHD\r\n\x1a\n"


@dataclass
class Header:
    minor: int
    tensor_count: int
    incompatible: int
    file_size: int
    sizes: list[int]  # of TABLE, NAMES, METADATA, EXTENSION
    crcs: list[int]  # of the same
    digest: bytes
    control: tuple[int, int]  # stored and decoded bytes of CONTROL, of a packed file


def read_header(data: bytes) -> Header:
    """2.1, checks 1 to 7; and, of a packed file, which fields are zero (2.3)."""
    check(data[:8] == MAGIC, "bad_magic", 0)
    check(len(data) >= HEADER.size, "truncated", len(data))
    fields = HEADER.unpack_from(data)
    _, major, minor, count, incompatible, _compatible, file_size, names, metadata, ext = fields[:10]
    check(major == 1, "unsupported_version", 8)
    check(zlib.crc32(data[:124]) == fields[18], "header_checksum", 124)
    check(incompatible & ~(FEATURE_ZSTD | FEATURE_PACKED) == 0, "unknown_feature", 16)
    zeros = (*fields[12:14], fields[17]) if incompatible & FEATURE_PACKED else fields[15:18]
    check(not any(zeros), "reserved_not_zero", 112)
    check(len(data) >= file_size, "truncated", len(data))
    check(len(data) <= file_size, "trailing_data", file_size)
    check(count <= MAX_TENSORS, "limit_exceeded", 12)
    check(names <= MAX_NAMES_SIZE, "limit_exceeded", 40)
    check(metadata <= MAX_METADATA_SIZE, "limit_exceeded", 48)
    check(ext <= MAX_EXTENSION_SIZE, "limit_exceeded", 56)
    sizes = [RECORD.size * count, names, metadata, ext]
    return Header(minor, count, incompatible, file_size, sizes, list(fields[10:14]), fields[14], fields[15:17])


def check_padding(data: bytes, end: int) -> None:
    """2: the bytes between the end of a section and the next multiple of 64 are zero."""
    check(not any(data[end : align64(end)]), "padding_not_zero", end)


def read_file_sections(data: bytes, header: Header) -> tuple[list[int], int]:
    """2.2: the offsets of TABLE, NAMES, METADATA and EXTENSION, and the aligned end of the last."""
    offsets = []
    end = HEADER.size
    for size in header.sizes:
        offsets.append(end)
        end = align64(end + size)
    check(end <= header.file_size, "section_layout", offsets[-1])
    for offset, size, crc in zip(offsets, header.sizes, header.crcs, strict=True):
        check(zlib.crc32(data[offset : offset + size]) == crc, "section_checksum", offset)
        check_padding(data, offset + size)
    return offsets, end


def read_metadata(data: bytes, at: int, size: int) -> dict[str, str]:
    """2.2: pairs of strings, keys strictly increasing in byte order."""
    metadata: dict[str, str] = {}
    end = at + size
    key_before = b""  # so that an empty key is refused too, even as the first
    while at < end:
        check(end - at >= 8, "bad_metadata", at)
        key_size, value_size = struct.unpack_from("<II", data, at)
        check(key_size + value_size <= end - at - 8, "bad_metadata", at)
        value_at = at + 8 + key_size
        key = data[at + 8 : value_at]
        check(key > key_before, "bad_metadata", at)
        value = data[value_at : value_at + value_size]
        metadata[utf8(key, "bad_metadata", at)] = utf8(value, "bad_metadata", at)
        key_before = key
        at = value_at + value_size
    return metadata


def unpack(data: bytes, header: Header, zstd: Zstd | None) -> bytes:
    """2.3: the file that a packed one stands for."""
    stored, decoded = header.control
    rest_at = HEADER.size + stored
    check(rest_at <= len(data), "section_layout", HEADER.size)
    check(zlib.crc32(data[HEADER.size : rest_at]) == header.crcs[0], "section_checksum", HEADER.size)
    check(zlib.crc32(data[rest_at:]) == header.crcs[1], "section_checksum", rest_at)
    check(decoded <= stored * MAX_ZSTD_RATIO, "zstd_ratio", HEADER.size)
    leads_at = sum(header.sizes)
    check(decoded >= leads_at, "bad_size", HEADER.size)
    control = undo_zstd(data[HEADER.size : rest_at], decoded, zstd)

    records, sections = [], []
    for i in range(header.tensor_count):
        fields = list(RECORD.unpack(control[i : RECORD.size * header.tensor_count : header.tensor_count]))
        check(fields[0] == 0, "reserved_not_zero", HEADER.size)
        for first, crc, flag in (12, 18, ZSTD_INDEX), (15, 19, ZSTD_VALUES):
            lead, size, decoded_size = fields[first : first + 3]
            is_zstd = bool(fields[7] & flag)
            check(fields[crc] == 0 and (is_zstd or decoded_size == 0), "reserved_not_zero", HEADER.size)
            tail = 8 if size and not is_zstd else 0
            check(lead + tail <= size and leads_at + lead <= decoded, "bad_size", HEADER.size)
            middle = size - lead - tail
            check(rest_at + middle <= len(data), "section_layout", HEADER.size)
            section = control[leads_at : leads_at + lead] + data[rest_at : rest_at + middle] + bytes(tail)
            sections.append(section)
            leads_at, rest_at = leads_at + lead, rest_at + middle
            fields[crc] = zlib.crc32(section)
            if not is_zstd:
                fields[first + 2] = size
        records.append(fields)
    check(leads_at == decoded, "bad_size", HEADER.size)
    check(rest_at == len(data), "section_layout", HEADER.size)

    place = HEADER.size + sum(align64(size) for size in header.sizes)
    name_offset = 0
    for i, fields in enumerate(records):
        fields[0] = name_offset & 0xFFFFFFFF
        name_offset += fields[1]
        for first, section in zip((12, 15), sections[2 * i : 2 * i + 2], strict=True):
            fields[first] = place
            place += align64(len(section))
    at, parts = header.sizes[0], [b"".join(RECORD.pack(*fields) for fields in records)]
    for size in header.sizes[1:]:
        parts.append(control[at : at + size])
        at += size
    head = list(HEADER.unpack_from(data))
    head[4] &= ~FEATURE_PACKED
    head[6], head[10:14], head[15:17] = place, map(zlib.crc32, parts), (0, 0)
    head[18] = zlib.crc32(HEADER.pack(*head)[:124])
    return HEADER.pack(*head) + b"".join(part + bytes(align64(len(part)) - len(part)) for part in parts + sections)


# --- 3. The tensor table ---

RECORD = struct.Struct("<IHBBBBBBIQQQQQQQQQII8Q")
HAS_BASE_FINGERPRINT, HAS_RESULT_FINGERPRINT, ZSTD_INDEX, ZSTD_VALUES = 1, 2, 4, 8


@dataclass
class Section:
    """Where an INDEX or VALUES section is."""

    offset: int
    stored: int
    decoded: int
    crc: int
    zstd: bool


@dataclass
class Record:
    """A record whose checks have passed."""

    tensor: Tensor  # its positions and values come later
    raw_name: bytes
    dtype_id: int
    op_id: int
    nnz: int
    numel: int
    index: Section
    values: Section

    @property
    def word_size(self) -> int:
        """W of section 3.2."""
        return 4 if self.numel <= 0xFFFFFFFF else 8

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype_id][1]

    @property
    def needs_base(self) -> bool:
        return self.tensor.index_codec in FROM_BASE_CODECS or self.tensor.value_codec in FROM_BASE_CODECS


def read_table(data: bytes, header: Header, offsets: list[int], end: int) -> list[Record]:
    """3: all records. `end` is where the section of the record before ended, aligned."""
    names = data[offsets[1] : offsets[1] + header.sizes[1]]
    records: list[Record] = []
    names_end = 0
    name_before = b""  # smaller than every name
    for i in range(header.tensor_count):
        at = offsets[0] + RECORD.size * i
        fields = RECORD.unpack_from(data, at)
        raw_name, name = read_name(names, fields[0], fields[1], names_end, name_before, at)
        with within(name, at):
            record = read_record(fields, raw_name, name)
            end = check_section(data, header, record, "INDEX", end)
            end = check_section(data, header, record, "VALUES", end)
        records.append(record)
        names_end += len(raw_name)
        name_before = raw_name
    check(names_end == header.sizes[1], "name_layout", offsets[1] + names_end)
    check(end == header.file_size, "section_layout", end)
    return records


def read_name(names: bytes, offset: int, size: int, names_end: int, before: bytes, at: int) -> tuple[bytes, str]:
    """3, checks 1 to 3."""
    check(offset == names_end and offset + size <= len(names), "name_layout", at)
    check(0 < size <= MAX_NAME_SIZE, "bad_name", at)
    raw = names[offset : offset + size]
    name = utf8(raw, "bad_name", at)
    check(all(byte >= 0x20 and byte != 0x7F for byte in raw), "bad_name", at)
    check(raw != before, "duplicate_name", at)
    check(raw > before, "name_order", at)
    return raw, name


def read_record(fields: tuple[int, ...], raw_name: bytes, name: str) -> Record:
    """3, checks 4 to 9."""
    rank, dtype, op, index_codec, value_codec, flags, zero, nnz, base, result = fields[2:12]
    check(zero == 0 and flags <= 15, "reserved_not_zero")
    check(dtype < len(DTYPES), "unknown_dtype")
    check(op in OPS, "unknown_op")
    check(index_codec in INDEX_CODECS, "unknown_index_codec")
    check(value_codec in VALUE_CODECS, "unknown_value_codec")
    shape, numel = read_shape(rank, fields[20:28])
    check(nnz <= numel, "bad_count")
    names = DTYPES[dtype][0], OPS[op], INDEX_CODECS[index_codec], VALUE_CODECS[value_codec]
    base_is_there = bool(flags & HAS_BASE_FINGERPRINT)
    result_is_there = bool(flags & HAS_RESULT_FINGERPRINT)
    fingerprints = base if base_is_there else None, result if result_is_there else None
    tensor = Tensor(name, *names, shape, [], [], *fingerprints)
    check(goes_together(tensor, nnz, numel), "bad_combination")
    check(base_is_there or base == 0, "reserved_not_zero")
    check(result_is_there or result == 0, "reserved_not_zero")
    index = Section(fields[12], fields[13], fields[14], fields[18], bool(flags & ZSTD_INDEX))
    values = Section(fields[15], fields[16], fields[17], fields[19], bool(flags & ZSTD_VALUES))
    return Record(tensor, raw_name, dtype, op, nnz, numel, index, values)


def read_shape(rank: int, dims: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """3, check 6: the shape and numel. A 0 makes numel 0 whatever the other dimensions are."""
    check(rank <= MAX_RANK and not any(dims[rank:]), "bad_shape")
    shape = dims[:rank]
    numel = 1
    for dim in shape:
        check(dim <= MAX_NUMEL, "bad_shape")
        numel *= dim  # at most 2^448: eight factors of at most 2^56
    check(numel <= MAX_NUMEL, "bad_shape")
    return shape, numel


def goes_together(t: Tensor, nnz: int, numel: int) -> bool:
    """3.1"""
    empty = nnz == 0
    if (t.index_codec == "NONE") != empty or (t.value_codec == "NONE") != empty:
        return False
    if t.index_codec == "ALL" and nnz != numel:
        return False
    has_base, has_result = t.base_fingerprint is not None, t.result_fingerprint is not None
    specified = t.dtype != "unspecified"
    signed_floats = t.dtype.startswith(("float", "bfloat")) and t.dtype != "float8_e8m0fnu"
    if (t.index_codec in FROM_BASE_CODECS or t.value_codec in FROM_BASE_CODECS) and not signed_floats:
        return False
    if not specified and (has_base or has_result):
        return False
    if t.op == "DROP":
        return empty and not has_result
    if t.op == "ADD":
        adds = ("float32", "float16", "bfloat16", "unspecified")
        return t.dtype in adds and t.value_codec not in ("BITS", "ULP", "ULP_FROM_BASE")
    if t.op == "ULP":
        return specified and t.dtype != "complex64" and t.value_codec in ("ULP", "ULP_FROM_BASE", "NONE")
    if not specified or t.value_codec not in ("BITS", "NONE"):
        return False  # SET, NEW and REPLACE
    if t.op in ("NEW", "REPLACE"):  # the codecs are NONE where numel is 0 and only there, by the first rule
        return nnz == numel and t.index_codec in ("ALL", "NONE") and not (has_base and t.op == "NEW")
    return True


def check_section(data: bytes, header: Header, r: Record, which: str, place: int) -> int:
    """3, check 10, for INDEX or VALUES: gives the aligned end."""
    s = r.index if which == "INDEX" else r.values
    check(s.offset == place, "section_layout")
    end = align64(s.offset + s.stored)
    check(end <= header.file_size, "section_layout")
    if s.zstd:
        allowed = bool(header.incompatible & FEATURE_ZSTD)
        check(allowed and s.stored > 0 and s.decoded > 0, "bad_combination")
        check(s.decoded <= s.stored * MAX_ZSTD_RATIO, "zstd_ratio")
    else:
        check(s.decoded == s.stored, "section_layout")
    check(s.stored > 0 or s.crc == 0, "section_checksum")
    right = index_size_fits(r) if which == "INDEX" else values_size_fits(r)
    check(right, "bad_size")
    check_padding(data, s.offset + s.stored)
    return end


SLACK = 8


def index_size_fits(r: Record) -> bool:
    """3.2, the first table."""
    codec, size = r.tensor.index_codec, r.index.decoded
    if codec == "RICE":
        return size >= 24
    if codec == "RAW":
        return size == r.nnz * r.word_size + SLACK
    if codec == "BITMAP":
        directory = ceil_div(r.numel, 2048) * r.word_size
        return size == directory + 4 * ceil_div(r.numel, 32) + SLACK
    if codec == "STRUCT":
        entries, rest = divmod(size - SLACK, 32)
        return rest == 0 and 1 <= entries <= MAX_STRUCT_ENTRIES
    if codec == "TILED":
        return size >= 60
    if codec == "SEEDED":
        return size >= 24
    if codec == "FROM_BASE":
        return size >= 40
    return size == 0  # NONE, ALL


def values_size_fits(r: Record) -> bool:
    """3.2, the second table."""
    if r.tensor.value_codec == "ULP":
        return r.values.decoded >= 24 + 8 * ceil_div(r.nnz, 8192) + 4 * ceil_div(r.nnz, 32) + SLACK
    if r.tensor.value_codec == "ULP_FROM_BASE":
        return r.values.decoded >= 16 + 4 + 4 * ceil_div(r.nnz, 8192) + 4 * ceil_div(r.nnz, 32) + SLACK
    return r.values.decoded == values_size(r)


def values_size(r: Record) -> int:
    """3.2, the second table without ULP and ULP_FROM_BASE. It bounds nnz by the file's size, for ALL and STRUCT too."""
    if r.tensor.value_codec == "NONE":
        return 0
    n, groups = r.nnz, ceil_div(r.nnz, 128)
    parts = {
        "F32": 4 * n,
        "F16": align4(2 * n),
        "BF16": align4(2 * n),
        "I8": align4(2 * groups) + align4(n),
        "I4": 4 * groups + align4(ceil_div(n, 2)),
        "SIGN": align4(2 * groups) + 4 * ceil_div(n, 32),
        "BITS": align4(n * r.element_size),
    }
    return parts[r.tensor.value_codec] + SLACK


# --- 4. Index codecs ---


def read_section(data: bytes, s: Section, zstd: Zstd | None) -> bytes:
    """4: checks the CRC and undoes zstd. Empty sections go through it too: their CRC is 0."""
    stored = data[s.offset : s.offset + s.stored]
    check(zlib.crc32(stored) == s.crc, "section_checksum")
    return undo_zstd(stored, s.decoded, zstd) if s.zstd else stored


def undo_zstd(stored: bytes, size: int, zstd: Zstd | None) -> bytes:
    """4: the contents of a frame, of that size."""
    if zstd is None:
        raise Refused("zstd_unavailable")
    try:
        decoded = zstd(stored, size)
    except Exception as error:  # any failure of the library means that the frame is bad
        raise Refused("bad_zstd") from error
    check(len(decoded) == size, "bad_zstd")
    return decoded


class Parts:
    """Takes the parts of a decoded section one after the other.

    Every part is padded with zeros to a multiple of 4 bytes (3.2), so that all of them can be seen
    as a number of bits in u32 words. What is unused is looked at by `finish`: it is the last check.
    """

    def __init__(self, section: bytes) -> None:
        self.section = section
        self.at = 0
        self.padding_is_zero = True

    def take(self, bits: int) -> bytes:
        """The next part, with its padding."""
        part = self.section[self.at : self.at + 4 * ceil_div(bits, 32)]
        self.at += len(part)
        unused = int.from_bytes(part[bits // 8 :], "little") >> (bits % 8)  # less than 32 bits
        self.padding_is_zero &= unused == 0
        return part

    def words(self, count: int, word_size: int) -> tuple[int, ...]:
        """A part of `count` unsigned integers of 1, 2, 4 or 8 bytes."""
        part = self.take(8 * count * word_size)
        return struct.unpack_from(f"<{count}{UNSIGNED[word_size]}", part)

    def fields(self, count: int, width: int) -> list[int]:
        """A part of `count` integers of `width` bits, which may end beyond the section."""
        check(self.at + 4 * ceil_div(count * width, 32) <= len(self.section), "bad_size")
        part = self.take(count * width)
        return [low_bits(part, i * width, width) for i in range(count)]

    def finish(self) -> None:
        slack = self.section[self.at :]
        check(self.padding_is_zero and not any(slack), "padding_not_zero")


UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}  # for struct


def decode_positions(r: Record, section: bytes, base: Base | None) -> list[int]:
    codec = r.tensor.index_codec
    if codec in ("NONE", "ALL"):  # 4.1
        return list(range(r.nnz))
    if codec == "FROM_BASE":
        return decode_from_base(r, Parts(section), base_keys(r, base))
    if codec == "SEEDED":
        return decode_seeded(r, section)
    decoders = {
        "RICE": decode_rice,
        "RAW": decode_raw,
        "BITMAP": decode_bitmap,
        "STRUCT": decode_struct,
        "TILED": decode_tiled,
    }
    parts = Parts(section)
    positions = decoders[codec](r, parts)
    parts.finish()
    return positions


def decode_rice(r: Record, parts: Parts) -> list[int]:
    """4.2"""
    k, *zeros = parts.words(8, 1)
    check(k <= MAX_RICE_K and not any(zeros), "bad_index")
    (unary_bits,) = parts.words(1, 8)
    blocks = ceil_div(unary_bits, 2048)
    words = ceil_div(r.nnz * k, 32) + ceil_div(unary_bits, 32)
    size = 16 + blocks * 2 * r.word_size + 4 * words + SLACK
    check(len(parts.section) == size, "bad_size")  # from here on the section bounds all loops

    directory = parts.words(2 * blocks, r.word_size)
    low = parts.take(r.nnz * k)
    ones = [bit for bit in ones_of(parts.take(unary_bits)) if bit < unary_bits]
    # nnz is at least 1 where the codec is RICE, so that ones[-1] exists after the first test.
    check(len(ones) == r.nnz and ones[-1] == unary_bits - 1, "bad_index")

    positions = []
    position = bit_before = -1
    for i, bit in enumerate(ones):
        q = bit - bit_before - 1
        position += 1 + (q << k) + low_bits(low, i * k, k)
        positions.append(position)
        bit_before = bit
    check(positions[-1] < r.numel, "position_range")  # they increase: the last is the largest
    check(directory == rice_directory(ones, positions, blocks, k), "bad_directory")
    return positions


def low_bits(low: bytes, at: int, k: int) -> int:
    """k bits from bit `at` on: at most 7 + 31 bits, so that they lie in 5 bytes."""
    byte = at // 8
    return (int.from_bytes(low[byte : byte + 5], "little") >> (at % 8)) & ((1 << k) - 1)


def rice_directory(ones: list[int], positions: list[int], blocks: int, k: int) -> tuple[int, ...]:
    """4.2: `base` and `rank` of all blocks."""
    directory = []
    rank = 0
    for block in range(blocks):
        start = 2048 * block
        while ones[rank] < start:  # ends: the last one is at the last bit, in the last block
            rank += 1
        bit_before, position_before = (ones[rank - 1], positions[rank - 1]) if rank else (-1, -1)
        zeros = start - bit_before - 1
        directory += [position_before + 1 + (zeros << k), rank]
    return tuple(directory)


def decode_raw(r: Record, parts: Parts) -> list[int]:
    """4.3"""
    positions = list(parts.words(r.nnz, r.word_size))
    in_order = all(a < b for a, b in pairwise(positions))
    check(in_order, "position_order")
    check(positions[-1] < r.numel, "position_range")
    return positions


def decode_bitmap(r: Record, parts: Parts) -> list[int]:
    """4.4"""
    directory = parts.words(ceil_div(r.numel, 2048), r.word_size)
    positions = [bit for bit in ones_of(parts.take(r.numel)) if bit < r.numel]
    check(len(positions) == r.nnz, "bad_index")
    rank = 0
    for block, entry in enumerate(directory):
        while rank < r.nnz and positions[rank] < 2048 * block:
            rank += 1
        check(entry == rank, "bad_directory")
    return positions


ROW, COLUMN, DIAGONAL = 0, 1, 2


def decode_struct(r: Record, parts: Parts) -> list[int]:
    """4.5. nnz is at least 1 here, so numel is too, and no dimension is 0."""
    shape = r.tensor.shape
    rows = shape[0] if len(shape) >= 2 else 1
    columns = r.numel // rows
    union: set[int] = set()
    counted = [0, 0, 0]  # elements of each kind
    kind_before, line_before = ROW, -1
    for _ in range((len(parts.section) - SLACK) // 32):
        kind, start, step, count = struct.unpack("<QqQQ", parts.take(8 * 32))
        check(kind <= DIAGONAL and step >= 1 and count >= 1, "bad_index")
        last = start + (count - 1) * step
        lowest = -(rows - 1) if kind == DIAGONAL else 0
        highest = rows - 1 if kind == ROW else columns - 1
        check(lowest <= start and last <= highest, "bad_index")
        in_order = kind > kind_before or (kind == kind_before and start > line_before)
        check(in_order, "position_order")
        # There may be 2^56 lines. Each has an element, hence no more than nnz are looked at; and a
        # line may have 2^56 elements: it is a range until we know that it has no more than nnz.
        for line in range(start, last + 1, step):
            elements = line_elements(kind, line, rows, columns)
            counted[kind] += len(elements)
            check(counted[kind] <= r.nnz, "bad_index")
            union.update(elements)
        kind_before, line_before = kind, last
    check(len(union) == r.nnz, "bad_index")
    return sorted(union)


def line_elements(kind: int, line: int, rows: int, columns: int) -> range:
    """The positions on a line. All numbers are below 2^58, as len() of a range needs."""
    if kind == ROW:
        return range(line * columns, (line + 1) * columns)
    if kind == COLUMN:
        return range(line, rows * columns, columns)
    first_row, end_row = max(0, -line), min(rows, columns - line)
    step = columns + 1  # from (r, r + d) to (r + 1, r + 1 + d)
    first = first_row * step + line
    return range(first, first + (end_row - first_row) * step, step)


def decode_tiled(r: Record, parts: Parts) -> list[int]:
    """4.6"""
    row_bits, column_bits, *zeros = parts.words(4, 1)
    (tile_rows,) = parts.words(1, 4)
    columns, unary_bits = parts.words(2, 8)
    check(1 <= row_bits <= MAX_CLASS_BITS and 1 <= column_bits <= MAX_CLASS_BITS and not any(zeros), "bad_index")
    check(tile_rows >= 1 and columns >= 1 and r.numel % columns == 0, "bad_index")
    rows = r.numel // columns
    check(tile_rows <= rows and tile_rows * columns <= MAX_TILE, "bad_index")
    tiles = ceil_div(rows, tile_rows)

    table = parts.fields(1 << (row_bits + column_bits), 8)
    check(max(table) <= MAX_RICE_K, "bad_index")
    ks = sorted(set(table))
    widths = parts.fields(1 + len(ks), 8)
    check(max(widths) <= MAX_TILE_FIELD, "bad_index")
    row_classes = parts.fields(rows, row_bits)
    column_classes = parts.fields(columns, column_bits)
    gaps = Gaps(parts, ks, *(parts.fields(tiles, width) for width in widths))
    gaps.check_size(unary_bits)
    check(sum(map(sum, gaps.counts)) == r.nnz and sum(gaps.sizes) == unary_bits, "bad_index")

    of_class = [[c for c in range(columns) if column_classes[c] == b] for b in range(1 << column_bits)]
    positions: list[int] = []
    for tile, numbers_of_ks in enumerate(gaps.tiles(unary_bits)):
        own_rows = range(tile * tile_rows, min((tile + 1) * tile_rows, rows))
        for k, numbers in zip(ks, numbers_of_ks, strict=True):
            runs = [
                (row * columns, of_class[b])
                for a in range(1 << row_bits)
                for b in range(1 << column_bits)
                if table[(a << column_bits) + b] == k
                for row in own_rows
                if row_classes[row] == a
            ]
            order_before_run = run = 0
            for number in numbers:
                while run < len(runs) and number - order_before_run >= len(runs[run][1]):
                    order_before_run += len(runs[run][1])
                    run += 1
                check(run < len(runs), "position_range")
                start, run_columns = runs[run]
                positions.append(start + run_columns[number - order_before_run])
    return sorted(positions)


class Gaps:
    """4.6 and 4.7: the parts from the sizes of tiles on. A *group* is a k of TILED, a byte of FROM_BASE."""

    def __init__(self, parts: Parts, ks: list[int], sizes: list[int], *counts: list[int]) -> None:
        self.parts = parts
        self.ks = ks  # of each group
        self.sizes = sizes  # of each tile
        self.counts = counts  # of each group, of each tile
        self.low_bits = sum(k * sum(of_tiles) for k, of_tiles in zip(ks, counts, strict=True))

    def check_size(self, unary_bits: int) -> None:
        """low, unary and slack are what is left."""
        words = ceil_div(self.low_bits, 32) + ceil_div(unary_bits, 32)
        check(len(self.parts.section) == self.parts.at + 4 * words + SLACK, "bad_size")

    def tiles(self, unary_bits: int) -> Iterator[list[list[int]]]:
        """For each tile, once its unary bits were checked: the numbers o of each group, which may be too large."""
        low = self.parts.take(self.low_bits)
        ones = [bit for bit in ones_of(self.parts.take(unary_bits)) if bit < unary_bits]
        first_one = first_bit = low_at = 0
        for tile, size in enumerate(self.sizes):
            end_bit, end_one = first_bit + size, first_one + sum(of_tiles[tile] for of_tiles in self.counts)
            own = ones[first_one:end_one]
            # The ones before are those of earlier tiles: so this tile has these, if the last is its last bit.
            right = len(own) == end_one - first_one and all(first_bit <= bit < end_bit for bit in own)
            right &= end_one >= len(ones) or ones[end_one] >= end_bit
            check(right and (own[-1] + 1 if own else first_bit) == end_bit, "bad_index")
            bit_before = first_bit - 1
            found = []
            for k, of_tiles in zip(self.ks, self.counts, strict=True):
                numbers, number = [], -1
                for bit in ones[first_one : first_one + of_tiles[tile]]:
                    number += 1 + ((bit - bit_before - 1) << k) + low_bits(low, low_at, k)
                    numbers.append(number)
                    bit_before, low_at = bit, low_at + k
                first_one += of_tiles[tile]
                found.append(numbers)
            yield found
            first_bit = end_bit


def decode_seeded(r: Record, section: bytes) -> list[int]:
    """4.8"""
    seed, cells = struct.unpack_from("<QQ", section)
    check(r.nnz <= cells <= min(r.numel, MAX_CELLS) and ceil_div(r.numel, cells) <= MAX_CELL, "bad_index")
    parts = Parts(section[16:])
    chosen: Iterable[int] = range(cells)
    if cells == r.nnz:
        check(len(section) == 16 + SLACK, "bad_size")
    else:
        check(len(section) >= 16 + 24, "bad_size")
        others = 2 * r.nnz > cells  # and then cells is bounded by the file
        chosen = decode_rice(replace(r, nnz=cells - r.nnz if others else r.nnz, numel=cells), parts)
        if others:
            chosen = sorted(set(range(cells)) - set(chosen))
    parts.finish()
    return [drawn(seed, cell, cells, r.numel) for cell in chosen]


def drawn(seed: int, cell: int, cells: int, numel: int) -> int:
    """4.8: the position of a cell."""
    start, end = (i * (numel // cells) + i * (numel % cells) // cells for i in (cell, cell + 1))
    return start + ((mix(cell, seed) >> 32) * (end - start) >> 32)


def base_keys(r: Record, base: Base | None) -> list[int]:
    """4.7: the keys of all elements of the base's tensor; its size is what can be seen of its dtype and shape."""
    if base is None:
        raise Refused("base_needed")
    elements = base.get(r.tensor.name, b"")
    check(len(elements) == r.numel * r.element_size, "wrong_base")
    bits = 8 * r.element_size
    mask, lowest = (1 << (bits - 1)) - 1, max(bits - 16, 0)
    return [(element & mask) >> lowest for (element,) in struct.iter_unpack(f"<{UNSIGNED[r.element_size]}", elements)]


def decode_from_base(r: Record, parts: Parts, keys: list[int]) -> list[int]:
    """4.7"""
    row_bits, column_bits, classes, zero = parts.words(4, 1)
    (tile_rows,) = parts.words(1, 4)
    columns, unary_bits = parts.words(2, 8)
    check(row_bits <= MAX_CLASS_BITS and column_bits <= MAX_CLASS_BITS, "bad_index")
    check(1 <= classes <= MAX_BASE_CLASSES and zero == 0, "bad_index")
    check(tile_rows >= 1 and columns >= 1 and r.numel % columns == 0, "bad_index")
    rows = r.numel // columns
    check(tile_rows <= rows and tile_rows * columns <= MAX_BASE_TILE, "bad_index")
    tiles = ceil_div(rows, tile_rows)

    thresholds = parts.fields(classes - 1, 16)
    check(all(a <= b for a, b in pairwise(thresholds)), "bad_index")
    table = parts.fields(classes << (row_bits + column_bits), 8)
    check(not any(byte & 0x60 for byte in table), "bad_index")
    groups = sorted(set(table))
    widths = parts.fields(1 + len(groups), 8)
    check(max(widths) <= MAX_BASE_TILE_FIELD, "bad_index")
    row_classes = parts.fields(rows, row_bits)
    column_classes = parts.fields(columns, column_bits)
    gaps = Gaps(parts, [byte & 31 for byte in groups], *(parts.fields(tiles, width) for width in widths))
    gaps.check_size(unary_bits)
    check(sum(gaps.sizes) == unary_bits, "bad_index")

    positions: list[int] = []
    for tile, numbers_of_groups in enumerate(gaps.tiles(unary_bits)):
        members: dict[int, list[int]] = {byte: [] for byte in groups}
        for position in range(tile * tile_rows * columns, min((tile + 1) * tile_rows, rows) * columns):
            row, column = divmod(position, columns)
            line = (row_classes[row] << column_bits) + column_classes[column]
            members[table[line * classes + bisect_right(thresholds, keys[position])]].append(position)
        nonzeros: set[int] = set()
        for byte, numbers in zip(groups, numbers_of_groups, strict=True):
            check(all(number < len(members[byte]) for number in numbers), "wrong_base")
            listed = {members[byte][number] for number in numbers}
            nonzeros |= set(members[byte]) - listed if byte & 0x80 else listed
        positions += sorted(nonzeros)
    parts.finish()
    check(len(positions) == r.nnz, "wrong_base")
    return positions


# --- 5. Value codecs ---


def decode_values(r: Record, section: bytes, base: Base | None) -> list[int]:
    """The bit patterns: binary32 for ADD, the dtype's for SET, NEW and REPLACE, two's complement for ULP."""
    codec = r.tensor.value_codec
    if codec == "NONE":
        return []
    parts = Parts(section)
    if codec == "BITS":
        values = list(parts.words(r.nnz, r.element_size))  # may hold anything
    elif codec == "I8":
        values = decode_i8(r.nnz, parts)
    elif codec == "I4":
        values = decode_i4(r.nnz, parts)
    elif codec == "SIGN":
        values = decode_sign(r.nnz, parts)
    elif codec == "ULP":
        values = decode_ulp(r.nnz, 8 * r.element_size, parts)
    elif codec == "ULP_FROM_BASE":
        keys = base_keys(r, base)
        values = decode_ulp_from_base([keys[position] for position in r.tensor.positions], 8 * r.element_size, parts)
    else:
        values = decode_floats(codec, r.nnz, parts)
    parts.finish()
    return values


def decode_floats(codec: str, n: int, parts: Parts) -> list[int]:
    if codec == "F32":
        values = list(parts.words(n, 4))
    elif codec == "BF16":
        values = [half << 16 for half in parts.words(n, 2)]
    else:  # a binary16 is exact in binary64 and in binary32; an infinity or a NaN stays one
        values = [bits32(half) for half in struct.unpack_from(f"<{n}e", parts.take(16 * n))]
    check(all(map(is_finite32, values)), "bad_value")
    return values


def parameter(bf16: int) -> float:
    """A scale, lo or step: finite, and its sign bit clear. Positive infinity is 0x7F80; NaN and
    everything with the sign bit set, -0 too, are larger when seen as integers."""
    check(bf16 < 0x7F80, "bad_value")
    return float32(bf16 << 16)


def decode_i8(n: int, parts: Parts) -> list[int]:
    """fl32(scale * q): 8 bits times 8 bits, exact in binary64, so that it is rounded once (and
    needs no rounding: a product has 16 bits and is a multiple of the smallest bf16, 2^-133).
    The sign is that of the IEEE product: scale = 0 gives -0 where q is negative."""
    scales = [parameter(scale) for scale in parts.words(ceil_div(n, 128), 2)]
    for scale in scales:
        check(is_finite32(bits32(scale * 128)), "bad_value")
    codes = struct.unpack_from(f"<{n}b", parts.take(8 * n))
    return [bits32(scales[i // 128] * q) for i, q in enumerate(codes)]


def decode_i4(n: int, parts: Parts) -> list[int]:
    groups = ceil_div(n, 128)
    numbers = parts.words(2 * groups, 2)
    tables = [i4_values(numbers[2 * g], numbers[2 * g + 1]) for g in range(groups)]
    nibbles = parts.take(4 * n)
    return [tables[i // 128][(nibbles[i // 2] >> (4 * (i % 2))) & 15] for i in range(n)]


def i4_values(lo_bits: int, step_bits: int) -> list[int]:
    """The values of the 16 nibbles in one group: fl32(lo + fl32(step * code)) and their negatives.

    The product has at most 8 + 3 bits: exact in binary64, then rounded once, by bits32.

    The sum is rounded twice, to binary64 by Python and to binary32 by bits32, and yet correctly.
    Let a >= b >= 0 be the two terms, both binary32, and 2^e <= a < 2^(e+1).
    - Where a + b fits in the 53 bits of a binary64, the first rounding changes nothing.
    - Otherwise b has a bit at or below 2^(e-52). b has 24 bits, so b < 2^(e-28), while a, a
      multiple of 2^(e-23), is at least 2^(e-24) away from the next midpoint of two binary32 (e is
      far above the denormals, as b's lowest bit is at least 2^-149). Thus a + b rounds to a, and so
      does its binary64 rounding, which lies between a and a + 2^(e-28) as both of them are
      binary64.
    """
    lo, step = parameter(lo_bits), parameter(step_bits)
    sums = [bits32(lo + float32(bits32(step * code))) for code in range(8)]
    check(is_finite32(sums[7]), "bad_value")  # the largest
    return sums + [bits | 0x80000000 for bits in sums]


def decode_sign(n: int, parts: Parts) -> list[int]:
    los = parts.words(ceil_div(n, 128), 2)
    for lo in los:
        parameter(lo)
    signs = parts.take(n)
    return [los[i // 128] << 16 | (signs[i // 8] >> (i % 8) & 1) << 31 for i in range(n)]


# --- 5.1 ULP ---


class Bits:
    """Reads one block's stream, from its first bit to its end; reading beyond is refused."""

    def __init__(self, stream: int, at: int, end: int) -> None:
        self.stream = stream
        self.at = at
        self.end = end

    def unary(self) -> int:
        """The zeros before the next one."""
        rest = self.stream >> self.at
        zeros = (rest & -rest).bit_length() - 1 if rest else self.end
        self.skip(zeros + 1)
        return zeros

    def field(self, width: int) -> int:
        number = (self.stream >> self.at) & ((1 << width) - 1)
        self.skip(width)
        return number

    def skip(self, bits: int) -> None:
        self.at += bits
        check(self.at <= self.end, "bad_value")


def decode_ulp(n: int, element_bits: int, parts: Parts) -> list[int]:
    k, j, *zeros = parts.words(8, 1)
    check(k <= 13 and j <= 62 and not any(zeros), "bad_value")
    stream_bits, listed = parts.words(2, 8)
    blocks = ceil_div(n, 8192)
    word = 4 if max(stream_bits, listed) <= 0xFFFFFFFF else 8
    size = 24 + blocks * 2 * word + 4 * ceil_div(n, 32) + 4 * ceil_div(stream_bits, 32) + SLACK
    check(len(parts.section) == size, "bad_size")  # from here on the section bounds all loops

    directory = parts.words(2 * blocks, word)
    signs = parts.take(n)
    stream = parts.take(stream_bits)
    bits, before = [*directory[::2], stream_bits], [*directory[1::2], listed]
    check(listed <= n and bits[0] == 0 and before[0] == 0, "bad_directory")
    check(all(a <= b for a, b in [*pairwise(bits), *pairwise(before)]), "bad_directory")

    values = []
    for block in range(blocks):
        count = before[block + 1] - before[block]
        magnitudes = [1] * min(8192, n - 8192 * block)
        rank = -1
        for gap, magnitude in read_listed(stream, bits[block], bits[block + 1], [k] * count, [j] * count):
            rank += 1 + gap
            check(rank < len(magnitudes) and magnitude < 1 << (element_bits - 1), "bad_value")
            magnitudes[rank] = magnitude
        values += with_signs(magnitudes, signs, 8192 * block, element_bits)
    return values


def read_listed(stream: bytes, at: int, end: int, ks: list[int], js: list[int]) -> list[tuple[int, int]]:
    """The gap before each shift that a block lists, and its magnitude."""
    check(len(ks) <= end - at, "bad_value")  # each takes at least a bit
    # A block's own bytes: a shift of a long integer takes as long as the integer is.
    own = int.from_bytes(stream[at // 8 : ceil_div(end, 8)], "little")
    reader = Bits(own, at % 8, end - at // 8 * 8)
    quotients = [reader.unary() for _ in ks]
    gaps = [(quotient << k) + reader.field(k) for quotient, k in zip(quotients, ks, strict=True)]
    widths = [j + reader.unary() for j in js]
    check(all(width <= 63 for width in widths), "bad_value")
    fields = [reader.field(width) for width in widths]
    check(reader.at == reader.end, "bad_value")
    magnitudes = [2 + (1 << width) + field - (1 << j) for width, field, j in zip(widths, fields, js, strict=True)]
    return list(zip(gaps, magnitudes, strict=True))


def with_signs(magnitudes: list[int], signs: bytes, first: int, bits: int) -> list[int]:
    """Two's complement of so many bits; the magnitudes are those of ranks from `first` on."""
    minus = [signs[i // 8] >> (i % 8) & 1 for i in range(first, first + len(magnitudes))]
    return [(-m if sign else m) & ((1 << bits) - 1) for m, sign in zip(magnitudes, minus, strict=True)]


# --- 5.2 ULP_FROM_BASE ---


def decode_ulp_from_base(keys: list[int], element_bits: int, parts: Parts) -> list[int]:
    """The shifts, given the keys of the base's elements at their positions."""
    classes, width, *zeros = parts.words(8, 1)
    (stream_bits,) = parts.words(1, 8)
    check(1 <= classes <= MAX_BASE_CLASSES and width <= 14 and not any(zeros), "bad_value")
    thresholds = parts.fields(classes - 1, 16)
    check(all(a <= b for a, b in pairwise(thresholds)), "bad_value")
    parameters = parts.fields(2 * classes, 8)
    ks, js = parameters[::2], parameters[1::2]
    check(max(ks) <= 13 and max(js) <= 62, "bad_value")
    n, blocks = len(keys), ceil_div(len(keys), 8192)
    counts = [parts.fields(blocks, width) for _ in range(classes)]
    word = 4 if stream_bits <= 0xFFFFFFFF else 8
    size = parts.at + blocks * word + 4 * ceil_div(n, 32) + 4 * ceil_div(stream_bits, 32) + SLACK
    check(len(parts.section) == size, "bad_size")
    bits = [*parts.words(blocks, word), stream_bits]
    check(bits[0] == 0 and all(a <= b for a, b in pairwise(bits)), "bad_directory")
    signs = parts.take(n)
    stream = parts.take(stream_bits)

    # The ranks of each block's shifts by class, and how many of each class it lists.
    ranks: list[list[list[int]]] = [[[] for _ in range(classes)] for _ in range(blocks)]
    for rank, key in enumerate(keys):
        ranks[rank // 8192][bisect_right(thresholds, key)].append(rank)
    lists = [[of_blocks[block] for of_blocks in counts] for block in range(blocks)]
    for of_classes, there in zip(lists, ranks, strict=True):
        check(all(count <= len(own) for count, own in zip(of_classes, there, strict=True)), "wrong_base")
    listed = []
    for block, of_classes in enumerate(lists):
        own_ks = [k for k, count in zip(ks, of_classes, strict=True) for _ in range(count)]
        own_js = [j for j, count in zip(js, of_classes, strict=True) for _ in range(count)]
        listed.append(iter(read_listed(stream, bits[block], bits[block + 1], own_ks, own_js)))
    magnitudes = [1] * n
    for shifts, of_classes, there in zip(listed, lists, ranks, strict=True):
        for count, own in zip(of_classes, there, strict=True):
            number = -1
            for gap, magnitude in islice(shifts, count):
                number += 1 + gap
                check(number < len(own), "wrong_base")
                magnitudes[own[number]] = magnitude
    check(max(magnitudes) < 1 << (element_bits - 1), "bad_value")
    return with_signs(magnitudes, signs, 0, element_bits)


# --- 6.1 ULP ---


def ordered(bits: int, dtype: str) -> int:
    """o of the bits of an element."""
    size = 8 * next(size for name, size in DTYPES if name == dtype)
    signed = bits - (1 << size) if bits >> (size - 1) else bits
    if dtype in ("int8", "int16", "int32", "int64"):
        return signed
    if dtype in ("uint8", "uint16", "uint32", "uint64", "bool", "float8_e8m0fnu"):
        return bits - (1 << (size - 1))
    return signed if signed >= 0 else signed ^ ((1 << (size - 1)) - 1)


# --- 6.3 Fingerprints (a delta does not hold its base, so that decode() checks none) ---

MASK64 = (1 << 64) - 1


def mix(position: int, bits: int) -> int:
    x = (position * 0x9E3779B97F4A7C15 + (bits + 1) * 0xD1B54A32D192ED03) & MASK64
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK64
    return x ^ (x >> 32)


def fingerprint(pairs: Iterable[tuple[int, int]]) -> int:
    """Of pairs of a position and the bits of its element."""
    return sum(mix(position, bits) for position, bits in pairs) & MASK64


# --- 7. Content digest ---


def tensor_digest(r: Record) -> bytes:
    """T of section 7."""
    t = r.tensor
    value_size = 4 if t.op == "ADD" else r.element_size
    hashed = hashlib.sha256(bytes([r.op_id, r.dtype_id, len(t.shape)]))
    hashed.update(struct.pack(f"<{len(t.shape)}Q", *t.shape))
    hashed.update(struct.pack(f"<Q{r.nnz}Q", r.nnz, *t.positions))
    if t.values:
        hashed.update(struct.pack(f"<{r.nnz}{UNSIGNED[value_size]}", *t.values))
    return hashed.digest()


# --- the whole: container, every tensor in order, digest ---


def decode_tensor(data: bytes, r: Record, zstd: Zstd | None, base: Base | None = None) -> None:
    with within(r.tensor.name, r.index.offset):
        r.tensor.positions = decode_positions(r, read_section(data, r.index, zstd), base)
    with within(r.tensor.name, r.values.offset):
        r.tensor.values = decode_values(r, read_section(data, r.values, zstd), base)


def decode(data: bytes, zstd: Zstd | None = None, base: Base | None = None) -> Delta:
    """Reads and checks everything; raises Refused and nothing else.

    `zstd(stored, decoded_size)` decodes one frame with nothing behind it, or raises.
    `base` has the bytes of tensors by name: little-endian elements, flat and row-major.
    """
    header = read_header(data)
    if header.incompatible & FEATURE_PACKED:
        data = unpack(data, header, zstd)
        header = read_header(data)
    offsets, end = read_file_sections(data, header)
    metadata = read_metadata(data, offsets[2], header.sizes[2])
    records = read_table(data, header, offsets, end)
    digest = hashlib.sha256(b"shiradelta 1" + struct.pack("<I", header.tensor_count))
    for record in records:
        decode_tensor(data, record, zstd, base)
        digest.update(struct.pack("<H", len(record.raw_name)) + record.raw_name)
        digest.update(tensor_digest(record))
    wrong = "wrong_base" if any(record.needs_base for record in records) else "digest_mismatch"
    check(digest.digest() == header.digest, wrong, 80)
    return Delta(header.minor, header.digest.hex(), metadata, [r.tensor for r in records])


def read_safetensors(data: bytes) -> dict[str, bytes]:
    """The bytes of each tensor: a u64, so many bytes of JSON, and what that tells the places of."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: data[header_end + start : header_end + end] for name, (start, end) in places.items()}


def installed_zstd() -> Zstd | None:
    """That of the package zstandard; None where it is not installed."""
    try:
        import zstandard
    except ImportError:
        return None

    def decompressed(stored: bytes, size: int) -> bytes:
        if zstandard.frame_content_size(stored) != size:
            raise ValueError("another size")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)

    return decompressed


def main(arguments: list[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print("usage: python decoder.py FILE [BASE.safetensors ...]", file=sys.stderr)
        return 2
    file, *bases = (Path(argument).read_bytes() for argument in arguments)
    base = {name: elements for each in bases for name, elements in read_safetensors(each).items()}
    try:
        delta = decode(file, installed_zstd(), base if bases else None)
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(delta), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
