"""The protocols of codecs, and helpers that several codecs share.

A codec is one class in one file, and one row in `shiradelta.format.codecs`.  It works on the decoded bytes of one
section and knows nothing of files: it raises FormatError with a reason code, and the decoder adds file, tensor and
offset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.util.arrays import ranges

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]


class IndexCodec(ABC):
    """Positions <-> the bytes of an INDEX section.

    Attributes:
        id: its number in a file.
        name: its name in spec/REGISTRY.md.
        minor: the minor version of the format that defines it; the writer derives the file's from it.
        least: bytes of its smallest section.
        needs_base: only the base's elements tell the positions; see `shiradelta.format.codecs.from_base`.
    """

    id: int
    name: str
    minor: int = 0
    least: int = 0
    needs_base: bool = False

    @abstractmethod
    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """Bytes of `encode`'s result; None where the codec cannot hold these positions."""

    @abstractmethod
    def size_is_possible(self, size: int, nnz: int, numel: int) -> bool:
        """Whether a section may have `size` bytes, judged by the table alone."""

    @abstractmethod
    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """The canonical section."""

    @abstractmethod
    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Positions:
        """int64 [nnz], checked."""

    def windows(self, data: Bytes, nnz: int, shape: tuple[int, ...]) -> Iterator[Positions]:
        """What `decode` gives, in runs of at most `WINDOW`; everything has been checked when the last one was taken.

        A codec that can decode a part overrides this, so that its files are read in little memory.
        """
        positions = self.decode(data, nnz, shape)
        for start, stop in ranges(nnz):
            yield positions[start:stop]

    @abstractmethod
    def decode_between(
        self, data: Bytes, nnz: int, shape: tuple[int, ...], start: int, stop: int
    ) -> tuple[int, Positions]:
        """(rank of the first one, positions) of all positions in [start, stop)."""

    def lead(self, data: Bytes, nnz: int, numel: int) -> int:
        """Bytes of a valid section before its streams, which compress; all but the slack of a small one."""
        return small_lead(data)


class ValueCodec(ABC):
    """Values <-> the bytes of a VALUES section.  `size` is the bytes of one element of the base's dtype.

    It may also be a `TorchDecoder` and a `TorchRounder`; see there what happens without.

    Attributes:
        id: its number in a file.
        name: its name in spec/REGISTRY.md.
        option: what a user types to have values stored so; None where no user chooses it.
        adds: it holds float32 values that are added.
        shifts: it holds integers of the elements' size, as unsigned bits, by which elements move.  A codec that neither
            adds nor shifts holds elements' bits, which replace.
        idempotent: `encode` of what `decode` gives is the same section again.
        minor: the minor version of the format that defines it; the writer derives the file's from it.
        needs_base: only the base's elements at the positions tell the values; see
            `shiradelta.format.codecs.ulp_from_base`.
    """

    id: int
    name: str
    option: str | None
    adds: bool = True
    shifts: bool = False
    idempotent: bool = True
    minor: int = 0
    needs_base: bool = False

    @abstractmethod
    def size(self, nnz: int, size: int) -> int:
        """Bytes of a section; of the smallest one, if `size_is_possible` takes others."""

    def size_is_possible(self, section: int, nnz: int, size: int) -> bool:
        """Whether a section may have `section` bytes, judged by the table alone."""
        return section == self.size(nnz, size)

    @abstractmethod
    def encode(self, values: Array) -> bytes:
        """The canonical section, of float32 values if the codec adds, otherwise of unsigned bits.

        Raises:
            DeltaError: a value does not fit the codec.
        """

    @abstractmethod
    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """Values of the nonzeros with ranks from start to stop - 1: float32 if the codec adds, else unsigned bits."""

    def spans(self, nnz: int, size: int, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Where a section has the bytes that `decode` reads; None if a part cannot be decoded without the others."""
        return None

    @abstractmethod
    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Checks the whole section, which `decode` trusts: parameters or values, padding, slack."""

    def lead(self, data: Bytes, nnz: int) -> int:
        """As that of an index codec."""
        return small_lead(data)

    def cut(self, data: Bytes, size: int, start: int, stop: int) -> bytes | None:
        """The section of the nonzeros with ranks from start to stop - 1; None if their bytes depend on others."""
        return None

    def codes_at(self, nnz: int) -> int:
        """Offset of the codes in a section, after the groups' parameters; 0 without parameters."""
        return 0


class TorchDecoder(ValueCodec):
    """A value codec that torch can decode on a device, which then holds the section itself.

    Live tensors on a device hold the values of any other codec as float32 (or elements' bits), decoded by NumPy when
    the file is loaded.
    """

    @abstractmethod
    def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
        """All nonzeros of a checked section in uint8: what `decode` gives, elements as signed integers."""


class TorchRounder(ABC):
    """A value codec that can be fitted, since torch can round to it.  Fitting refuses other codecs by name."""

    @abstractmethod
    def round_torch(self, groups: torch.Tensor) -> torch.Tensor:
        """Rounds float32 values as a reader will see them, in groups [groups, 128]; NaN stands for no value."""


def part(data: Bytes, offset: int, count: int, dtype: str) -> npt.NDArray[Any]:
    """`count` little-endian numbers at `offset`, as a view."""
    size = count * int(np.dtype(dtype).itemsize)
    return data[offset : offset + size].view(dtype)


def check_zero(data: Bytes, offset: int) -> None:
    """Checks that everything from `offset` on is zero: padding or slack."""
    if data[offset:].any():
        raise FormatError("padding_not_zero", "behind the last part of a section")


def padded(data: bytes) -> bytes:
    """`data` with zeros up to a multiple of 4."""
    return data + bytes(-len(data) % 4)


def with_slack(data: Array) -> bytes:
    """The bytes of an array with zeros up to a multiple of 4, and slack."""
    return b"".join((data.data, bytes(-data.nbytes % 4), SLACK))


SLACK = bytes(registry.SLACK)
#: The most bytes of a section that is small.
_SMALL = 64


def small_lead(data: Bytes) -> int:
    """All but the slack of a small section; otherwise 0."""
    return max(data.size - registry.SLACK, 0) if data.size <= _SMALL else 0


def check_positions(positions: Positions, numel: int) -> None:
    """Checks that the last of increasing positions is inside the tensor."""
    if positions.size and positions[-1] >= numel:
        raise FormatError("position_range", f"position {positions[-1]} of {numel} elements")


def between(positions: Positions, start: int, stop: int) -> tuple[int, Positions]:
    """The part of sorted positions that lies in [start, stop), and the rank of its first."""
    first, last = np.searchsorted(positions, [start, stop])
    return int(first), positions[first:last]
