"""Zstandard frames, as sections and packed files have them (spec/FORMAT.md, section 4)."""

from __future__ import annotations

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes

#: The level of `compressed`: files are written once and read often.
LEVEL = 19
#: The level for what is compressed although nobody asked for that: some fifty times as fast.
FAST = 3


def has_zstd() -> bool:
    """Whether zstd sections can be read."""
    try:
        import zstandard  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def unzstd(stored: Bytes, decoded: int) -> bytes:
    """Decompresses one zstd frame of exactly `decoded` bytes.  Raises FormatError."""
    if not has_zstd():
        raise FormatError("zstd_unavailable")
    import zstandard

    try:
        # zstandard allocates the size that the frame claims, so that is checked first.
        if zstandard.frame_content_size(stored.data) != decoded:
            raise FormatError("bad_zstd", "the frame's content size differs")
        return zstandard.ZstdDecompressor().decompress(stored.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError("bad_zstd", str(error)) from None


def compressed(payload: bytes, level: int = LEVEL) -> bytes | None:
    """A frame of these bytes; None where it is not smaller, or smaller than the format allows."""
    import zstandard

    frame = zstandard.ZstdCompressor(level=level).compress(payload)
    return frame if len(frame) < len(payload) <= len(frame) * registry.MAX_ZSTD_RATIO else None
