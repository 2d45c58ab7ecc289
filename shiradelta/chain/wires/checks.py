"""What the readers of wires share: a step is whole and made for the model before it, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from shiradelta.errors import ArgumentError, ShiraDeltaError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.safetensors import Slot
from shiradelta.util.arrays import distinct
from shiradelta.util.optional import importing
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

#: (name, all bits before, all bits after) of a tensor of a step.
Change = tuple[str, Array, Array]
#: Dtypes whose elements may be NaN -> the bits of infinity; the bits of NaN without their sign are above them.
INFINITY = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
_LARGEST = (1 << 63) - 1


class Digest(Protocol):
    """A hash function of hashlib's form."""

    def update(self, data: memoryview, /) -> None:
        """Takes more bytes."""

    def hexdigest(self) -> str:
        """Hexadecimal digits of all bytes so far."""


@contextmanager
def described(where: str) -> Iterator[None]:
    """A context that reads what a step says of itself, of which nothing is known to be there.

    Raises:
        SourceError: the block has failed.
    """
    try:
        yield
    except ArgumentError as error:  # a registry does not know what the step names
        raise SourceError(f"{where}: {error}") from None
    except ShiraDeltaError:
        raise
    except KeyError as error:
        raise SourceError(f"{where}: is damaged (no {brief(str(error), 80)}); get the step again") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise SourceError(f"{where}: is damaged ({brief(str(error), 160)}); get the step again") from None


def number(value: object) -> int:
    """A whole number from 0 to 2^63 - 1.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{brief(repr(value), 40)} is no whole number from 0 to 2^63 - 1")
    return value


def text(value: object) -> str:
    """A text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{brief(repr(value), 40)} is no text")
    return value


def sequence(value: object) -> Sequence[object]:
    """A list or tuple.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"{brief(repr(value), 40)} is no list")
    return value


def part(data: Array, start: object, end: object) -> Array:
    """Part of an array, which has to be there.

    Raises:
        ValueError: it is not.
    """
    first, last = number(start), number(end)
    if not first <= last <= data.size:
        raise ValueError(f"{first:,} to {last:,} of {data.size:,} are not there")
    return data[first:last]


def viewed(data: Array, dtype: str) -> Array:
    """Bytes as numbers of a NumPy dtype, in an array of its own.

    Raises:
        ValueError: there are some bytes too many.
    """
    return np.frombuffer(data.tobytes(), dtype)


def target(where: str, name: str, base: Checkpoint, dtype: str, shape: Sequence[object] | None = None) -> Slot:
    """The tensor that a step changes.

    Args:
        where: the step's tensor, for messages.
        name: its name.
        base: the model before the step.
        dtype: what the step says of it.
        shape: what the step says of it; None if it does not.

    Raises:
        SourceError: the model has no such tensor.
    """
    if name not in base:
        raise SourceError(f"{where} is not in {base.root}; give the model before the step")
    slot = base[name]
    if slot.dtype.name != dtype or (shape is not None and slot.shape != tuple(shape)):
        said = brief(f"{dtype}{'' if shape is None else f' {list(shape)}'}", 120)
        there = f"{slot.dtype.name} {list(slot.shape)} in {base.root}"
        raise SourceError(f"{where} is {said}, and {there}; give the model before the step")
    return slot


def assigned(where: str, old: Array, positions: Array, values: Array) -> Array:
    """A copy of a tensor's bits with values at positions, which may be in any order.

    Raises:
        SourceError: positions are out of range or repeated, or there are more or fewer of them than values.
    """
    if positions.size != values.size:
        raise SourceError(f"{where} has {positions.size:,} positions for {values.size:,} values; get the step again")
    at = positions.astype(np.int64, copy=False)
    if at.size:
        if at.min() < 0 or at.max() >= old.size:
            raise SourceError(f"{where} has positions beyond its {old.size:,} elements; get the step again")
        if np.any(at[1:] <= at[:-1]) and distinct(at).size < at.size:
            raise SourceError(f"{where} has a position twice; get the step again")
    new = old.copy()
    new[at] = values
    return new


def positions_of_gaps(gaps: Array, skips: int) -> Array:
    """Positions from the unsigned gaps between them, as int64; -1 in place of all if the last one does not fit.

    Args:
        gaps: how far each position is from the one before it, less `skips`.
        skips: 1 if the gap between neighbours is 0, and the first is counted from -1; 0 if it is 1, counted from 0.
    """
    if gaps.sum(dtype=np.float64) + skips * gaps.size >= _LARGEST:
        return np.full(gaps.size, -1, np.int64)
    found: Array = np.cumsum(gaps.astype(np.int64) + skips) - skips
    return found


def is_nan(bits: Array, dtype: str) -> Array:
    """Which elements are NaN, of a dtype of `INFINITY`."""
    infinity = INFINITY[dtype]
    found: Array = (bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)) > bits.dtype.type(infinity)
    return found


def verified(where: str, base: Checkpoint, changes: Iterable[Change], digest: Digest, wanted: str) -> Iterator[Change]:
    """Passes the changes of a step on, and compares the bytes of the whole model after it, by name, with a digest.

    Args:
        where: the step, for messages.
        base: the model before it.
        changes: the tensors that it changes, by name.
        digest: what to feed with them and with all others.
        wanted: its hexadecimal digits.

    Raises:
        SourceError: they are others.
    """
    rest = iter(sorted(base))
    for change in changes:
        for name in rest:
            digest.update(np.ascontiguousarray(change[2] if name == change[0] else base.bits(name)).view(np.uint8).data)
            if name == change[0]:
                break
        yield change
    for name in rest:
        digest.update(base.bits(name).view(np.uint8).data)
    if digest.hexdigest() != wanted:
        raise SourceError(f"{where}: does not give the model of its checksum; give the model before the step")


def unzipped(where: str, packed: bytes, most: int) -> bytes:
    """What a frame of zstd holds.

    Args:
        where: what it is, for messages.
        packed: the frame, which says how many bytes it holds.
        most: how many those may be.

    Raises:
        SourceError: it is damaged, or holds more.
        MissingDependencyError: zstandard is not installed.
    """
    with importing("a step that is compressed by zstd"):
        import zstandard
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= most:
            raise ValueError(f"says that it has {size:,} bytes for at most {most:,}")
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size) if size else b""
        if len(raw) != size:
            raise ValueError(f"has {len(raw):,} bytes for {size:,}")
    except (ValueError, zstandard.ZstdError) as error:
        raise SourceError(f"{where} {error}; get it again, or give the model before the step") from None
    return raw


def read_bytes(path: Path) -> bytes:
    """The bytes of a step's file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with open_regular(path) as stream:
            return stream.read()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); get the step again") from None


def names_in(folder: Path) -> list[str]:
    """The names in a step's folder, in order.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder}: cannot be read ({error.strerror}); give the folder of a step") from None


def inside(folder: Path, name: object) -> Path:
    """A file directly in a step's folder, by the name that the step gives.

    Raises:
        ValueError: the name leads elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{brief(repr(name), 80)} is no name of a file in its folder")
    return folder / name
