"""Tensors in pickles of PyTorch (`.bin`, `.pt`, `.ckpt`), read by torch's restricted unpickler.

A pickle is a program.  Two lists bound what it may do: that of this module, before anything runs, and torch's own.
Only `convert` reads pickles.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shiradelta.errors import MissingDependencyError, SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.models.memory import flat_bits
from shiradelta.models.safetensors import Shard, Slot
from shiradelta.util.optional import importing
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief, count

if TYPE_CHECKING:
    import torch

#: Earlier releases of torch run code of hostile pickles even with weights_only (CVE-2025-32434, CVE-2026-24747).
_OLDEST = (2, 10)
#: What a pickle of tensors names.
_NAMES = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(?:tensor|tensor_v2|tensor_v3|parameter|sparse_tensor)"
    r"|torch\.serialization _get_layout"
    r"|torch\.nn\.parameter Parameter"
    r"|torch(?:\.storage)? \w+Storage"
    r"|torch (?:Size|(?:b?float|u?int|complex)\d\w*|bool)"
)
#: Bytes and opcodes of the program, which takes some 150 and 30 a tensor.
_MOST_PROGRAM, _MOST_OPCODES = 32 << 20, 4_000_000
#: Pickles in a file of torch before 1.6: a magic number, the version, the system, the program, the storages' keys.
_LEGACY_PARTS = 5
#: What an archive begins with.
_ZIP = b"PK\x03\x04"
#: Keys of a checkpoint that hold the model's tensors.
_STATE = ("state_dict",)
_REMEDY = "load it where it was made, and save its tensors as safetensors"


def read_pickle(path: Path) -> Shard:
    """The tensors of a file of `torch.save`: a mapping of names to tensors, by itself or under "state_dict".

    Returns:
        The shard; its slots have no offsets.  Elements are mapped, but for those of files from before torch 1.6, which
        are in memory.

    Raises:
        SourceError: the file is damaged, or holds more than tensors.
        MissingDependencyError: torch is not installed, or has a known hole.
    """
    zipped, size, _ = _checked(path)
    tensors = _tensors(path, _load(path, zipped))
    return Shard(path, 0, None, tuple(_slot(path, name, tensor, size) for name, tensor in tensors.items()))


def holds_sparse(path: Path) -> bool:
    """Whether a file of `torch.save` holds sparse tensors; nothing of it is run.

    Raises:
        SourceError: it is damaged, or holds more than tensors.
    """
    return any(name.endswith("_rebuild_sparse_tensor") for name in _checked(path)[2])


def read_sparse(path: Path) -> dict[str, torch.Tensor]:
    """As `read_pickle`, of sparse tensors: name -> tensor.

    Raises:
        SourceError: the file is damaged, or holds more than tensors.
        MissingDependencyError: torch is not installed, or has a known hole.
    """
    zipped, _, _ = _checked(path)
    return _tensors(path, _load(path, zipped))


def loaded(raw: bytes, where: str) -> Any:
    """What the bytes of a file of `torch.save` hold: tensors, texts, numbers, and lists, tuples and mappings of them.

    Raises:
        SourceError: it is damaged, or holds anything else.
        MissingDependencyError: torch is not installed, or has a known hole.
    """
    zipped = raw.startswith(_ZIP)
    _check_program(Path(where), io.BytesIO(raw), zipped, len(raw))
    return _load(Path(where), zipped, io.BytesIO(raw))


def _checked(path: Path) -> tuple[bool, int, set[str]]:
    """(whether a file is an archive, its size, what its pickle names), once it is known to name tensors only."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            zipped = stream.read(4) == _ZIP
            stream.seek(0)
            return zipped, size, _check_program(path, stream, zipped, size)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _check_program(path: Path, stream: IO[bytes], zipped: bool, size: int) -> set[str]:
    """What a pickle names; refuses one that is not of tensors only, without running any of it.

    Raises:
        SourceError: it names other things than tensors are made of, or is damaged.
    """
    try:
        if zipped:
            with zipfile.ZipFile(stream) as archive:
                named = _names(io.BytesIO(archive.read(_program(archive, size))))
        else:
            programs = io.BytesIO(stream.read(_MOST_PROGRAM))
            named = set().union(*(_names(programs) for _ in range(_LEGACY_PARTS)))
    except Exception as error:  # whatever parsers make of damaged bytes
        what = brief(str(error), 100)
        raise SourceError(f"{path}: is not a file of torch.save, or damaged ({what}); get it again") from None
    others = sorted(name.replace(" ", ".") for name in named if not _NAMES.fullmatch(name))
    if others:
        few = ", ".join(brief(name, 80) for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise SourceError(f"{path}: is a pickle of more than tensors ({few}), which is not loaded; {_REMEDY}")
    return named


def _program(archive: zipfile.ZipFile, size: int) -> zipfile.ZipInfo:
    """The entry that is the program.

    Raises:
        ValueError: there is none, or the archive is none that torch writes: its entries are stored as they are.
    """
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("an entry is in it twice")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename!r} is compressed")
    programs = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(programs) != 1 or programs[0].file_size > min(size, _MOST_PROGRAM):
        raise ValueError("it has no data.pkl, several, or a huge one")
    return programs[0]


def _names(program: IO[bytes]) -> set[str]:
    """What a pickle imports, each "module name".

    Raises:
        ValueError: it is no pickle, reads names from its stack, or is longer than any.
    """
    found = set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):  # torch.save writes none of them
            raise ValueError(f"opcode {opcode.name}")
        if opcode.name == "GLOBAL":
            found.add(str(argument))
        if number > _MOST_OPCODES:
            raise ValueError("its program is huge")
    return found


def _load(path: Path, zipped: bool, stream: IO[bytes] | None = None) -> Any:
    """What a file holds, which may be in memory.

    Raises:
        SourceError: torch cannot load it.
        MissingDependencyError: torch is not installed, or too old.
    """
    purpose = f"{path}: a pickle of PyTorch"
    with importing(purpose):
        import torch
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise MissingDependencyError(
            f"{purpose} needs torch {wanted} or newer, because {torch.__version__} may run code that is in it; pip"
            f" install 'torch>={wanted}', or save it as safetensors",
            name="torch",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its storages' classes
        try:
            return torch.load(stream or path, map_location="cpu", weights_only=True, mmap=zipped and stream is None)
        except Exception as error:  # whatever a damaged program makes of torch's functions
            # Its advice is to load it with weights_only=False.
            what = brief(str(error).partition("\n")[0], 120)
            raise SourceError(f"{path}: torch cannot load it as tensors only ({what}); {_REMEDY}") from None


def _tensors(path: Path, held: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor.

    Raises:
        SourceError: there is anything else.
    """
    import torch

    found = held
    if isinstance(held, dict) and (state := [key for key in _STATE if key in held and isinstance(held[key], dict)]):
        found = held[state[0]]
        for key, value in dict.items(held):
            if key not in state and not (value is None or isinstance(value, str | int | float)):
                raise SourceError(f"{path}: holds {brief(repr(key), 80)} beside {state[0]!r}; {_REMEDY}")
    if not isinstance(found, dict) or not found:
        what = "no tensors" if found == {} else f"a {type(found).__name__}, not tensors by name"
        raise SourceError(f"{path}: holds {what}; {_REMEDY}")
    items = list(dict.items(found))  # a pickle may hide the method of its dict
    other = [key for key, value in items if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if other:
        some = count(other, "entry that is", "entries that are")
        raise SourceError(f"{path}: has {some} no tensor ({brief(repr(other[0]), 80)}); {_REMEDY}")
    return dict(items)


def _slot(path: Path, name: str, tensor: torch.Tensor, size: int) -> Slot:
    """A tensor's slot.

    Raises:
        SourceError: the tensor has no plain elements, or more than its file may hold.
    """
    import torch

    plain = torch.Tensor.detach(tensor)  # without the attributes that a pickle may put on it
    dtype = registry.DTYPE_OF_NAME.get(str(plain.dtype).removeprefix("torch."))
    called = f"{path}: tensor {brief(repr(name), 120)}"
    if dtype is None:
        raise SourceError(f"{called} has dtype {plain.dtype}, which .shd files do not know")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # a lone surrogate is no name
        length = 0
    if not 0 < length <= registry.MAX_NAME_SIZE:
        raise SourceError(f"{called} has a name that .shd files cannot hold")
    if plain.layout is not torch.strided or plain.device.type != "cpu" or plain.is_conj() or plain.is_neg():
        raise SourceError(f"{called} is sparse, without elements or a view that torch computes; {_REMEDY}")
    if plain.numel() * plain.element_size() > size:
        raise SourceError(f"{called} has shape {list(plain.shape)}, and the file has only {count(size, 'byte')}")
    return Slot(name, path, 0, tuple(plain.shape), dtype, partial(_elements, plain))


def _elements(tensor: torch.Tensor) -> Array:
    """`flat_bits` of a tensor, which nobody can write."""
    found = flat_bits(tensor)
    found.flags.writeable = False
    return found
