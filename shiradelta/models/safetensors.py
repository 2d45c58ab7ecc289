"""Safetensors files: the header, where each tensor lies, and writing them a tensor at a time.

Patching in place needs the tensors' offsets, which the safetensors library does not give.  It also writes only tensors
that are all in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.io.recognise import Wanted, explain
from shiradelta.util.progress import Progress
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief, count

_MAX_HEADER = 100 << 20
#: Sizes are 64 bits wide, as in the safetensors library.
_LIMIT = 1 << 64


@dataclass(frozen=True)
class Slot:
    """Where a tensor is stored: `offset` bytes into `file`, or, in a file of another format, what `read` gives."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: registry.DType
    read: Callable[[], Array] | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.size


@dataclass(frozen=True)
class Shard:
    """One safetensors file: what its header says.

    Attributes:
        stored_metadata: its `__metadata__`; None if it has none.
    """

    file: Path
    data_start: int
    stored_metadata: dict[str, str] | None
    slots: tuple[Slot, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `__metadata__`."""
        return dict(self.stored_metadata or {})


def read_shard(path: Path) -> Shard:
    """Parses and checks the header of a safetensors file, as strictly as the safetensors library does.

    Duplicate names are refused even where the library reads the last one.

    Raises:
        SourceError: it is not a safetensors file, or damaged.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                message = explain(path, Wanted.WEIGHTS)
                raise SourceError(message or f"{path}: is not a safetensors file, or cut off; get it again")
            raw = stream.read(length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_object)
        if isinstance(header, _Repeating):
            raise ValueError(f"{header.repeated!r} is in it twice")
        metadata = header.get("__metadata__")
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise ValueError("__metadata__ is no mapping of strings")
        slots = tuple(_slot(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__")
    except RecursionError:
        raise SourceError(f"{path}: its safetensors header is damaged (nested too deep); get it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else brief(str(error))
        raise SourceError(f"{path}: its safetensors header is damaged ({what}); get it again") from None
    _check_cover(path, slots, 8 + length, size)
    return Shard(path, 8 + length, metadata, slots)


class _Repeating(dict[str, Any]):
    """A JSON object that has a key more than once."""

    repeated: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    repeating.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return repeating


def _slot(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Slot:
    size = len(name.encode())  # a lone surrogate is no name
    if size > registry.MAX_NAME_SIZE:
        raise ValueError(f"tensor {name[:80]!r}... has a name of {size:,} bytes")
    if isinstance(entry, _Repeating):
        raise ValueError(f"tensor {name!r} has {entry.repeated!r} twice")
    if entry["dtype"] not in registry.DTYPE_OF_SAFETENSORS:
        dtype = brief(str(entry["dtype"]), 80)
        raise SourceError(f"{path}: tensor {name!r} has dtype {dtype}, which .shd files do not know")
    known = registry.DTYPE_OF_SAFETENSORS[entry["dtype"]]
    begin, end = entry["data_offsets"]
    slot = Slot(name, path, start + begin, tuple(entry["shape"]), known)
    if not all(type(number) is int and 0 <= number < _LIMIT for number in (begin, end, *slot.shape)):
        raise ValueError(f"tensor {name!r} has shape {list(slot.shape)} and offsets {begin}, {end}")
    if any(product >= _LIMIT for product in accumulate(slot.shape, mul)):
        raise ValueError(f"tensor {name!r} has shape {list(slot.shape)}, which is too large")
    if end - begin != slot.nbytes:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes for shape {list(slot.shape)}")
    return slot


def _check_cover(path: Path, slots: tuple[Slot, ...], start: int, size: int) -> None:
    """Checks that the tensors fill the file, one after the other.

    Raises:
        SourceError: they overlap, leave bytes out, or reach beyond the file's end.
    """
    end = start
    for slot in sorted(slots, key=lambda slot: (slot.offset, slot.nbytes)):
        if slot.offset != end:
            hole = slot.offset - end
            what = f"comes after {hole} bytes of no tensor" if hole > 0 else "overlaps the tensor before it"
            raise SourceError(f"{path}: its header is damaged (tensor {slot.name!r} {what}); get it again")
        end += slot.nbytes
    if end > size:
        raise SourceError(f"{path}: is cut off at {size} of {end} bytes; get it again")
    if end < size:
        raise SourceError(f"{path}: has {count(size - end, 'byte')} after its last tensor; get it again")


@dataclass(frozen=True)
class Unwritten:
    """A tensor to write: `read` gives its elements, as bits, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: registry.DType
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.size


def header_of(tensors: Iterable[Slot | Unwritten], metadata: Mapping[str, str] | None) -> bytes:
    """What a safetensors file begins with, if the tensors follow in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype.safetensors,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(
    stream: BinaryIO, tensors: Iterable[Unwritten], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Writes a safetensors file with one tensor in memory at a time.

    Args:
        stream: an empty file.
        tensors: what to write; each is read once.
        metadata: the file's `__metadata__`.
        progress: called with (tensor, done, total).
    """
    # Large elements first, so that all are aligned.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.size)
    stream.write(header_of(ordered, metadata))
    for number, tensor in enumerate(ordered):
        if progress:
            progress(tensor.name, number, len(ordered))
        _write(stream, tensor)


def _write(stream: BinaryIO, tensor: Unwritten) -> None:
    data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data
    assert len(data) == tensor.nbytes, tensor.name
    stream.write(data)
