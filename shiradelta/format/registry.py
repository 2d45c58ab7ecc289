"""Every magic number, id, limit and struct layout of the format; spec/REGISTRY.md holds the same tables."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAGIC = b"\x89SHD\r\n\x1a\n"
MAJOR = 1
SUFFIX = ".shd"

SECTION_ALIGNMENT = 64
SLACK = 8
BLOCK_BITS = 2048
GROUP = 128
#: Nonzeros that ULP and ULP_FROM_BASE decode independently of others.
ULP_BLOCK = 8192

# spec/FORMAT.md, section 2.1; the CRC-32 of the header follows in the last four bytes.
HEADER = struct.Struct("<8sHHIQQQQQQIIII32sII4x")
HEADER_SIZE = 128
DIGEST_OFFSET = 80
# Section 3: the record up to its dims, which are eight u64.
RECORD = struct.Struct("<IHBBBBBBIQQQQQQQQQII8Q")
RECORD_SIZE = 160
METADATA_PAIR = struct.Struct("<II")
RICE_HEAD = struct.Struct("<B7xQ")
ULP_HEAD = struct.Struct("<BB6xQQ")
ULP_FROM_BASE_HEAD = struct.Struct("<BB6xQ")
TILED_HEAD = struct.Struct("<BBHIQQ")
FROM_BASE_HEAD = struct.Struct("<BBBBIQQ")
SEEDED_HEAD = struct.Struct("<QQ")
STRUCT_ENTRY = struct.Struct("<QqQQ")
DIGEST_SEED = b"shiradelta 1"

assert HEADER.size + 4 == HEADER_SIZE
assert RECORD.size == RECORD_SIZE

MAX_TENSORS = 1 << 20
MAX_NAMES_SIZE = 64 << 20
MAX_METADATA_SIZE = 16 << 20
MAX_EXTENSION_SIZE = 64 << 20
MAX_NAME_SIZE = 1024
MAX_RANK = 8
MAX_NUMEL = 1 << 56
MAX_RICE_K = 31
MAX_STRUCT_ENTRIES = 256
MAX_TILE = 1 << 17
MAX_TILE_FIELD = 19
MAX_CLASS_BITS = 4
MAX_BASE_CLASSES = 16
MAX_BASE_TILE = 1 << 20
MAX_BASE_TILE_FIELD = 22
MAX_CELLS = (1 << 32) - 1
MAX_CELL = 1 << 32
#: The bit of a group's byte that says that the elements which are no nonzeros are listed.
TURNED = 1 << 7
MAX_ZSTD_RATIO = 64


class Incompatible(IntFlag):
    """Features without which a file cannot be read."""

    ZSTD = 1 << 0
    PACKED = 1 << 2  # bit 1 is never assigned: the conformance vectors use it as an unknown one


class Flag(IntFlag):
    """The flags of a record."""

    BASE_FINGERPRINT = 1 << 0
    RESULT_FINGERPRINT = 1 << 1
    INDEX_ZSTD = 1 << 2
    VALUES_ZSTD = 1 << 3


class Op(IntEnum):
    """What a delta does at its positions (section 6.1); an id without a row in `OPERATIONS` is reserved."""

    ADD = 0
    SET = 1
    ULP = 2
    NEW = 3
    DROP = 4
    UNKNOWN_5 = 5  # never assigned, as those below: the conformance vectors use them as unknown ids
    REPLACE = 6
    UNKNOWN_9 = 9
    UNKNOWN_255 = 255


class IndexId(IntEnum):
    """How positions are stored (section 4); an id without a row in `codecs.INDEX_CODECS` is reserved."""

    NONE = 0
    RICE = 1
    RAW = 2
    BITMAP = 3
    STRUCT = 4
    ALL = 5
    RICE_PERMUTED = 6
    TILED = 7
    ELIAS_FANO = 8
    RANS = 9
    SEEDED = 10
    FROM_BASE = 11
    UNKNOWN_12 = 12  # never assigned
    UNKNOWN_255 = 255


class ValueId(IntEnum):
    """How values are stored (section 5); an id without a row in `codecs.VALUE_CODECS` is reserved."""

    NONE = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    I8 = 4
    I4 = 5
    SIGN = 6
    BITS = 7
    ULP = 8
    UNKNOWN_9 = 9  # never assigned
    ULP_FROM_BASE = 10
    UNKNOWN_255 = 255


@dataclass(frozen=True)
class DType:
    """An element type: its id, torch's name, safetensors' name, bytes per element."""

    id: int
    name: str
    safetensors: str
    size: int

    @property
    def bits(self) -> str:
        """NumPy's name of the unsigned integer that holds an element's bits."""
        return f"<u{self.size}"


UNSPECIFIED = DType(0, "unspecified", "-", 0)
DTYPES: tuple[DType, ...] = (
    UNSPECIFIED,
    DType(1, "float32", "F32", 4),
    DType(2, "float16", "F16", 2),
    DType(3, "bfloat16", "BF16", 2),
    DType(4, "float64", "F64", 8),
    DType(5, "float8_e4m3fn", "F8_E4M3", 1),
    DType(6, "float8_e5m2", "F8_E5M2", 1),
    DType(7, "float8_e8m0fnu", "F8_E8M0", 1),
    DType(8, "bool", "BOOL", 1),
    DType(9, "uint8", "U8", 1),
    DType(10, "int8", "I8", 1),
    DType(11, "uint16", "U16", 2),
    DType(12, "int16", "I16", 2),
    DType(13, "uint32", "U32", 4),
    DType(14, "int32", "I32", 4),
    DType(15, "uint64", "U64", 8),
    DType(16, "int64", "I64", 8),
    DType(17, "float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    DType(18, "float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    DType(19, "complex64", "C64", 8),
)
DTYPE_OF_ID = {dtype.id: dtype for dtype in DTYPES}
DTYPE_OF_NAME = {dtype.name: dtype for dtype in DTYPES}
DTYPE_OF_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES if dtype is not UNSPECIFIED}
#: The dtypes of the weights that ADD is defined for.
ADD_DTYPES = ("float32", "float16", "bfloat16")
#: The dtypes that a record with ADD may have.
ADDABLE = frozenset({UNSPECIFIED.name, *ADD_DTYPES})


class Order(IntEnum):
    """How the bits of a dtype's elements are seen as an integer that grows with the element (section 6.1, ULP)."""

    SIGNED = 0
    UNSIGNED = 1
    SIGN_AND_MAGNITUDE = 2


_FLOATS = "float32 float16 bfloat16 float64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
_UNSIGNED = "float8_e8m0fnu bool uint8 uint16 uint32 uint64"
#: The dtypes whose elements have an order, and so can have ULP.
ORDERED = {
    **dict.fromkeys(_FLOATS.split(), Order.SIGN_AND_MAGNITUDE),
    **dict.fromkeys(_UNSIGNED.split(), Order.UNSIGNED),
    **dict.fromkeys(("int8", "int16", "int32", "int64"), Order.SIGNED),
}


def align(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def word_size(numel: int) -> int:
    """Bytes of a position in directories and RAW sections (section 3.2, W); of each of an array of sizes, too."""
    return 4 + 4 * (numel > 0xFFFF_FFFF)
