"""Checkpoints of torch.distributed.checkpoint: a folder with `.metadata` and `__0_0.distcp`, `__1_0.distcp`, ...

`.metadata` is a pickle, of which nothing is run: what torch's classes were given is read as plain data.  The tensors
are files of `torch.save`, one after the other.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.models.memory import flat_bits
from shiradelta.models.pickles import loaded
from shiradelta.models.safetensors import Shard, Slot
from shiradelta.util.plain_pickle import PickledObject, read_plain
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

#: Bytes of `.metadata`, and steps of its program: a piece of a tensor takes some 200 and 40.
_MOST, _MOST_OPCODES = 256 << 20, 50_000_000
#: Dictionaries of a checkpoint that hold the model's tensors, by their names.
_STATES = ("model", "state_dict", "model_state_dict", "module")
_REMEDY = "save the model's tensors as safetensors, or as a flat dictionary"


_TORCH = "torch.distributed.checkpoint"
_METADATA = "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata BytesStorageMetadata"
_NAMES = {
    *(f"{_TORCH}.metadata {name}" for name in _METADATA.split()),
    *(f"{_TORCH}.metadata {name}" for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *(f"{_TORCH}.{module} _StorageInfo" for module in ("filesystem", "_fsspec_filesystem")),
    *(f"pathlib {name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *("torch Size", "torch.serialization _get_layout"),
}


def _is_known(name: str) -> bool:
    """Whether torch writes what is so called; a dtype is a name of its module."""
    return name in _NAMES or re.fullmatch(r"torch [a-z]+[0-9]\w*|torch bool", name) is not None


class _SavedPiece(NamedTuple):
    """Where a box of a tensor's elements is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_distcp(path: Path) -> Shard:
    """The model's tensors of a checkpoint; its slots have no offsets, and read a tensor when they are asked.

    The names are those of a flat dictionary, or of one under "model", "state_dict", "model_state_dict" or "module";
    what else there is (an optimizer, a number of steps) is left.

    Args:
        path: its `.metadata`.

    Raises:
        SourceError: it is damaged, or it is unclear which tensors are the model's.
    """
    try:
        with open_regular(path) as stream:
            raw = stream.read(_MOST + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        if len(raw) > _MOST:
            raise ValueError("it is huge")
        about = _state(read_plain(raw, _is_known, _MOST_OPCODES))
        places = _places(path.parent, about["storage_data"])
        tensors = {str(key): _state(one) for key, one in about["state_dict_metadata"].items()}
        tensors = {key: one for key, one in tensors.items() if one and "chunks" in one}
        names = _names(path, tensors, about.get("planner_data") or {})
        slots = [_slot(path, names[key], key, tensors[key], places) for key in names]
    except SourceError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of Python's objects
        what = brief(f"{type(error).__name__}: {error}", 120)
        raise SourceError(
            f"{path}: is not of torch.distributed.checkpoint, or damaged ({what}); get it again"
        ) from None
    return Shard(path, 0, None, tuple(slots))


def _state(record: Any) -> dict[str, Any]:
    """The fields of an object."""
    if not isinstance(record, PickledObject):
        raise TypeError(f"a {type(record).__name__}")
    return dict(record.state) if isinstance(record.state, dict) else {}


def _places(folder: Path, stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """(key, offsets) -> (file, start, length)."""
    found = {}
    for index, info in stored.items():
        at, where = _state(index), _state(info)
        if where.get("transform_descriptors"):
            raise ValueError("its files are transformed")
        name = str(where["relative_path"])
        if Path(name).name != name:
            raise ValueError(f"a file outside of the folder, {brief(name, 80)}")
        start, length = _numbers((where["offset"], where["length"]))
        found[str(at["fqn"]), _numbers(at.get("offset") or ())] = folder / name, start, length
    return found


def _names(path: Path, tensors: Mapping[str, Any], paths: Mapping[Any, Any]) -> dict[str, str]:
    """Key -> name, of the model's tensors.

    Raises:
        SourceError: it is unclear which those are.
    """
    within: dict[tuple[str, ...], dict[str, str]] = {}
    for key in tensors:
        *above, name = (str(part) for part in paths.get(key, (key,)))
        within.setdefault(tuple(above), {})[key] = name
    chosen: list[tuple[str, ...]] = [above for above in within if len(above) == 1 and above[0] in _STATES]
    if not chosen:
        chosen = [()] if () in within else list(within)
    if len(chosen) != 1:
        groups = ", ".join(brief(repr(".".join(above)), 40) for above in chosen[:4]) or "nothing"
        raise SourceError(f"{path}: has tensors in {groups}, and which are the model's is unclear; {_REMEDY}")
    return within[chosen[0]]


def _slot(
    path: Path, name: str, key: str, about: Mapping[str, Any], places: Mapping[Any, tuple[Path, int, int]]
) -> Slot:
    called = f"{path}: tensor {brief(repr(name), 120)}"
    if not 0 < len(name.encode()) <= registry.MAX_NAME_SIZE:
        raise SourceError(f"{called} has a name that .shd files cannot hold")
    kind, shape = about["properties"].state[0].name.removeprefix("torch "), _numbers(about["size"])
    dtype = registry.DTYPE_OF_NAME.get(kind)
    if dtype is None:
        raise SourceError(f"{called} has dtype {brief(kind, 40)}, which .shd files do not know")
    pieces = []
    for chunk in map(_state, about["chunks"]):
        offsets, sizes = _numbers(chunk["offsets"]), _numbers(chunk["sizes"])
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + size > most for start, size, most in zip(offsets, sizes, shape, strict=True)
        ):
            raise SourceError(f"{called} has a piece outside of it; get it again")
        piece = _SavedPiece(offsets, sizes, *places[key, offsets])
        if math.prod(sizes) * dtype.size > piece.length:
            raise SourceError(f"{called} has a piece of {list(sizes)} in {piece.length} bytes; get it again")
        pieces.append(piece)
    if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
        raise SourceError(f"{called} is not there whole; get all files of the checkpoint")
    return Slot(name, path, 0, shape, dtype, partial(_elements, called, shape, dtype, tuple(pieces)))


def _numbers(sizes: object) -> tuple[int, ...]:
    """Numbers in a tuple, or in a torch.Size.  Raises TypeError for other things."""
    if isinstance(sizes, PickledObject) and sizes.name == "torch Size":
        (sizes,) = sizes.arguments or ((),)
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError("a shape of other things than numbers")
    return tuple(sizes)


def _elements(called: str, shape: tuple[int, ...], dtype: registry.DType, pieces: tuple[_SavedPiece, ...]) -> Array:
    """All elements' bits, flat.

    Raises:
        SourceError: a piece is missing, damaged, or another one than the metadata says.
    """
    result = np.zeros(shape, dtype.bits)
    seen = np.zeros(shape if len(pieces) > 1 else (), np.bool_)
    for piece in pieces:
        try:
            with open_regular(piece.file) as stream:
                if piece.start + piece.length > os.fstat(stream.fileno()).st_size:
                    raise SourceError(f"{piece.file}: is cut off; get the whole checkpoint")
                stream.seek(piece.start)
                tensor = loaded(stream.read(piece.length), f"{piece.file}, {called}")
        except OSError as error:
            raise SourceError(f"{piece.file}: cannot be read ({error.strerror}); get the whole checkpoint") from None
        found = (str(getattr(tensor, "dtype", "")).removeprefix("torch."), tuple(getattr(tensor, "shape", ())))
        if found != (dtype.name, piece.sizes):
            raise SourceError(f"{piece.file}: {called} has another piece there than the metadata says; get it again")
        box = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
        if len(pieces) > 1:
            if seen[box].any():
                raise SourceError(f"{called} has pieces that overlap; get it again")
            seen[box] = True
        result[box] = flat_bits(tensor.contiguous()).reshape(piece.sizes)
    flat: Array = result.reshape(-1)
    flat.flags.writeable = False
    return flat
