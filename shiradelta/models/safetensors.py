"""Safetensors files: the header, and where each tensor lies.

Patching in place needs the tensors' offsets, which the safetensors library does not give.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.format import registry

_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Slot:
    """Where a tensor is stored: `offset` bytes into `file`."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: registry.DType

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
    """One safetensors file: its header, parsed."""

    file: Path
    data_start: int
    header: dict[str, Any]
    slots: tuple[Slot, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `__metadata__`."""
        return dict(self.header.get("__metadata__", {}))


def read_shard(path: Path) -> Shard:
    """Parses and checks the header of a safetensors file.

    Raises:
        SourceError: it is not a safetensors file, or damaged.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise SourceError(f"{path}: is not a safetensors file, or cut off; get it again")
            raw = stream.read(length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        header = json.loads(raw)
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no mapping of strings")
        slots = tuple(_slot(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{path}: its safetensors header is damaged ({error}); get it again") from None
    end = max((slot.offset + slot.nbytes for slot in slots), default=8 + length)
    if end > size:
        raise SourceError(f"{path}: is cut off at {size} of {end} bytes; get it again")
    return Shard(path, 8 + length, header, slots)


def _slot(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Slot:
    if entry["dtype"] not in registry.DTYPE_OF_SAFETENSORS:
        raise SourceError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which .shd files do not know")
    dtype = registry.DTYPE_OF_SAFETENSORS[entry["dtype"]]
    begin, end = entry["data_offsets"]
    slot = Slot(name, path, start + begin, tuple(entry["shape"]), dtype)
    if not all(type(number) is int and number >= 0 for number in (begin, end, *slot.shape)) or (
        end - begin != slot.nbytes
    ):
        raise ValueError(f"tensor {name!r} has {end - begin} bytes for shape {list(slot.shape)}")
    return slot
