"""What a codec is, and the parts that several codecs share."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions

Bytes = npt.NDArray[np.uint8]


class IndexCodec(Protocol):
    """Positions <-> the bytes of an INDEX section."""

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """Bytes of `encode`'s result; None where the codec cannot hold these positions."""

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether a section of `size` bytes can be right, as far as the table tells."""

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """The canonical section."""

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        """int64 [nnz], checked."""

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """(rank of the first, positions) of those with start <= position < stop."""


class ValueCodec(Protocol):
    """Values <-> the bytes of a VALUES section.  `size` is the bytes of one element of the base's dtype."""

    def size(self, nnz: int, size: int) -> int:
        """Bytes of the section."""

    def encode(self, values: Array) -> bytes:
        """The canonical section, of float32 values (BITS: of unsigned elements)."""

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """float32 (BITS: unsigned elements) of the nonzeros of rank start to stop - 1."""

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Checks the whole section, which `decode` trusts: parameters or values, padding, slack."""


def part(data: Bytes, offset: int, count: int, dtype: str) -> npt.NDArray[Any]:
    """`count` little-endian numbers at `offset`, as a view."""
    size = count * int(np.dtype(dtype).itemsize)
    return data[offset : offset + size].view(dtype)


def check_zero(data: Bytes, offset: int) -> None:
    """Everything from `offset` on is padding or slack."""
    if data[offset:].any():
        raise FormatError("padding_not_zero", "behind the last part of a section")


def padded(data: bytes) -> bytes:
    """`data` with zeros up to a multiple of 4."""
    return data + bytes(-len(data) % 4)


SLACK = bytes(registry.SLACK)


def check_positions(positions: Positions, numel: int) -> None:
    """The last of increasing positions is inside the tensor."""
    if positions.size and positions[-1] >= numel:
        raise FormatError("position_range", f"position {positions[-1]} of {numel} elements")


def between(positions: Positions, start: int, stop: int) -> tuple[int, Positions]:
    """The part of sorted positions that lies in [start, stop), and the rank of its first."""
    first, last = np.searchsorted(positions, [start, stop])
    return int(first), positions[first:last]


class AllPositions:
    """ALL: every position, in no bytes."""

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """0, or None if a position is missing."""
        return 0 if positions.size == int(np.prod(shape, dtype=np.int64)) else None

    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Only 0 is."""
        return size == 0

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """Nothing."""
        return b""

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        """0 to nnz - 1."""
        return np.arange(nnz, dtype=np.int64)

    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """The range itself."""
        return start, np.arange(start, stop, dtype=np.int64)
