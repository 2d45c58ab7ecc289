"""Arrays in NumPy's `.npz` files, one slot each; nothing is unpickled."""

from __future__ import annotations

import zipfile
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


class NpzCheckpoint(Checkpoint):
    """The arrays of a `.npz` file.

    Raises:
        SourceError: it cannot be read, or holds more than arrays of numbers.
    """

    def __init__(self, path: Path) -> None:
        self.root = path
        try:
            with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
                slots = tuple(_slot(path, archive, entry) for entry in archive.infolist())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        except Exception as error:  # whatever parsers make of damaged bytes
            raise SourceError(f"{path}: is damaged ({brief(str(error), 120)}); get it again") from None
        self.shards = (Shard(path, 0, {}, slots),)
        self.folders = {"": path.parent}
        self._slots = {slot.name: slot for slot in slots}
        if len(self._slots) < len(slots):
            raise SourceError(f"{path}: has an array twice; get it again")


def _slot(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Slot:
    name = entry.filename.removesuffix(_END)
    if not entry.filename.endswith(_END) or not 0 < len(name.encode()) <= registry.MAX_NAME_SIZE:
        raise ValueError(f"{brief(repr(entry.filename), 80)} is no array")
    with archive.open(entry) as stream:
        shape, _, dtype = _header(stream)
        begun = stream.tell()
    known = registry.DTYPE_OF_NAME.get(dtype.name)
    if known is None or dtype.byteorder == ">":
        raise ValueError(f"{name!r} is {dtype}, which .shd files do not know")
    slot = Slot(name, path, 0, shape, known, partial(_elements, path, entry.filename))
    if slot.nbytes != entry.file_size - begun:
        raise ValueError(f"{name!r} has {entry.file_size - begun} bytes for shape {list(shape)}")
    return slot


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _elements(path: Path, name: str) -> Array:
    """An array's elements, flat and row by row."""
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive, archive.open(name) as entry:
            array = np.lib.format.read_array(entry, allow_pickle=False)
    except Exception as error:  # whatever parsers make of damaged bytes
        raise SourceError(f"{path}: {name!r} cannot be read ({brief(str(error), 120)}); get it again") from None
    flat = np.ascontiguousarray(array).reshape(-1)
    found: Array = flat.view(f"u{flat.itemsize}")
    found.flags.writeable = False
    return found
