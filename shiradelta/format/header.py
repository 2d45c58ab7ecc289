"""The header of a file (spec/FORMAT.md, 2.1)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.registry import Incompatible

_ZERO_AT, _CRC_AT = 112, 124


@dataclass(frozen=True)
class Header:
    """A header's fields.

    Attributes:
        minor: the minor version.
        tensor_count: records of the table.
        incompatible: feature bits that a reader has to know.
        compatible: feature bits that it may ignore.
        file_size: bytes of the file.
        sizes: bytes of NAMES, METADATA and EXTENSION.
        crcs: of TABLE and of these; of CONTROL and REST, and two zeros, in a packed file.
        digest: the content digest.
        control: stored and decoded bytes of CONTROL; zeros where the file is not packed.
    """

    minor: int
    tensor_count: int
    incompatible: int
    compatible: int
    file_size: int
    sizes: tuple[int, int, int]
    crcs: tuple[int, int, int, int]
    digest: bytes
    control: tuple[int, int] = (0, 0)

    @property
    def packed(self) -> bool:
        """Whether the file is packed (section 2.3)."""
        return bool(self.incompatible & Incompatible.PACKED)

    @property
    def whole_sizes(self) -> tuple[int, ...]:
        """Bytes of TABLE, NAMES, METADATA and EXTENSION."""
        return (self.tensor_count * registry.RECORD_SIZE, *self.sizes)

    def to_bytes(self) -> bytes:
        """The 128 bytes."""
        head = registry.HEADER.pack(
            registry.MAGIC,
            registry.MAJOR,
            self.minor,
            self.tensor_count,
            self.incompatible,
            self.compatible,
            self.file_size,
            *self.sizes,
            *self.crcs,
            self.digest,
            *self.control,
        )
        return head + crc32(head).to_bytes(4, "little")


#: From how many bytes on a function of `use_crc32` is faster, whose calls take longer.
_MANY = 1 << 15
_crc32_of_many: Callable[[Bytes | bytes, int], int] | None = None


def crc32(data: Bytes | bytes, before: int = 0) -> int:
    """The CRC-32 of zlib; 0 for no bytes.  `before` is that of the bytes in front."""
    if _crc32_of_many is not None and len(data) >= _MANY:
        return _crc32_of_many(data, before)
    return zlib.crc32(data if isinstance(data, bytes) else data.data, before)


def use_crc32(function: Callable[[Bytes | bytes, int], int]) -> None:
    """Has `crc32` call a function that gives the same, faster, for many bytes: libshd's, once that is loaded."""
    global _crc32_of_many
    _crc32_of_many = function


def read_header(data: Bytes) -> Header:
    """The header of a whole file, checked.

    Raises:
        FormatError: in the order and with the reasons of FORMAT.md.
    """
    if data[:8].tobytes() != registry.MAGIC:
        raise FormatError("bad_magic", offset=0)
    if data.size < registry.HEADER_SIZE:
        raise FormatError("truncated", f"{data.size} bytes, a header has {registry.HEADER_SIZE}", offset=data.size)
    (_, major, minor, count, incompatible, compatible, file_size, *rest) = registry.HEADER.unpack(
        data[: registry.HEADER.size].tobytes()
    )
    names, metadata, extension, *crcs, digest, control_stored, control_decoded = rest
    header = Header(
        minor,
        count,
        incompatible,
        compatible,
        file_size,
        (names, metadata, extension),
        (crcs[0], crcs[1], crcs[2], crcs[3]),
        digest,
        (control_stored, control_decoded),
    )
    if major != registry.MAJOR:
        raise FormatError("unsupported_version", f"version {major}.{minor}", offset=8)
    if crc32(data[:_CRC_AT]) != int.from_bytes(data[_CRC_AT : registry.HEADER_SIZE].tobytes(), "little"):
        raise FormatError("header_checksum", offset=_CRC_AT)
    unknown = incompatible & ~sum(Incompatible)
    if unknown:
        raise FormatError("unknown_feature", f"bits 0x{unknown:x}", offset=16)
    zero = _ZERO_AT + 8 if header.packed else _ZERO_AT
    if data[zero:_CRC_AT].any() or (header.packed and any(header.crcs[2:])):
        raise FormatError("reserved_not_zero", offset=zero)
    if data.size != file_size:
        reason = "truncated" if data.size < file_size else "trailing_data"
        raise FormatError(reason, f"{data.size} bytes of {file_size}", offset=min(data.size, file_size))
    for what, number, limit in (
        ("tensors", count, registry.MAX_TENSORS),
        ("bytes of names", names, registry.MAX_NAMES_SIZE),
        ("bytes of metadata", metadata, registry.MAX_METADATA_SIZE),
        ("bytes of extension", extension, registry.MAX_EXTENSION_SIZE),
    ):
        if number > limit:
            raise FormatError("limit_exceeded", f"{number} {what}, at most {limit}")
    return header
