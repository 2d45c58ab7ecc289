"""Arrays in NumPy's `.npz` files, one slot each; nothing is unpickled, and lengths are checked before they are used."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.safetensors import Shard, Slot
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

_END = ".npy"
#: Bytes that an archive may take in memory: this many, or so many times its size if that is more.
_MOST, _TIMES = 64 << 20, 64


class NpzCheckpoint(Checkpoint):
    """The arrays of a `.npz` file.

    Raises:
        SourceError: it cannot be read, or holds more than arrays of numbers.
    """

    def __init__(self, path: Path) -> None:
        self.root = path
        with _opened(path) as archive:
            slots = tuple(_slot(path, archive, entry) for entry in archive.infolist())
        self.shards = (Shard(path, 0, None, slots),)
        self.folders = {"": path.parent}
        self._slots = {slot.name: slot for slot in slots}
        if len(self._slots) < len(slots):
            raise SourceError(f"{path}: has an array twice; get it again")


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of a `.npz` file by name.

    Raises:
        SourceError: it is damaged, has other things in it, or unpacks to too much.
    """
    with _opened(path) as archive:
        return {entry.filename.removesuffix(_END): _read(archive, entry) for entry in archive.infolist()}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose entries do not unpack to too much; what goes wrong in the block is a SourceError."""
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy's, of headers that it mends
            unpacked, size = sum(entry.file_size for entry in archive.infolist()), os.fstat(stream.fileno()).st_size
            if unpacked > max(_MOST, _TIMES * size):
                raise SourceError(f"{path}: unpacks to {unpacked:,} bytes, more than arrays of its size; get it again")
            yield archive
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except SourceError:
        raise
    except Exception as error:  # whatever parsers make of damaged bytes
        raise SourceError(f"{path}: is damaged ({brief(str(error), 120)}); get it again") from None


def _slot(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Slot:
    name = entry.filename.removesuffix(_END)
    if not 0 < len(name.encode()) <= registry.MAX_NAME_SIZE:
        raise ValueError(f"{brief(repr(entry.filename), 80)} is no array")
    shape, dtype = _header(archive, entry)
    known = registry.DTYPE_OF_NAME.get(dtype.name)
    if known is None or dtype.byteorder == ">":
        raise ValueError(f"{name!r} is {dtype}, which .shd files do not know")
    return Slot(name, path, 0, shape, known, partial(_elements, path, entry.filename))


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array, which are those of as many bytes as its entry has.

    Raises:
        ValueError: they are not, or it is no array of numbers or text.
    """
    called = brief(repr(entry.filename), 80)
    if not entry.filename.endswith(_END):
        raise ValueError(f"{called} is no array")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read: Callable[[IO[bytes]], Any] = np.lib.format.read_array_header_2_0
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else read)(stream)
        stored = entry.file_size - stream.tell()
    if dtype.hasobject or not dtype.itemsize or any(size < 0 for size in shape):
        raise ValueError(f"{called} holds {brief(str(dtype), 80)}")
    if math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{called} has {stored} bytes for shape {brief(str(list(shape)), 80)}")
    return shape, dtype


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    _header(archive, entry)
    with archive.open(entry) as stream:
        found: np.ndarray[Any, Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return found


def _elements(path: Path, name: str) -> Array:
    """An array's elements, flat and row by row."""
    with _opened(path) as archive:
        array = _read(archive, archive.getinfo(name))
    flat = np.ascontiguousarray(array).reshape(-1)
    found: Array = flat.view(f"u{flat.itemsize}")
    found.flags.writeable = False
    return found
