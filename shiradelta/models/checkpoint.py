"""Checkpoints on disk: safetensors files, sharded models and pipelines, as one mapping of named tensors.

Tensors are seen as bit patterns (unsigned integers of the dtype's size) through a memory map, at known
places in their files: that is what patching in place needs and the safetensors library does not give.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import ShiraDeltaError, SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array

#: Weight files of one model, by preference, as transformers and diffusers name them.
_STANDARD = ("model", "diffusion_pytorch_model", "pytorch_model")
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_HEADER = 100 << 20
#: Prefixes that are tried on names.
_TRIED = 4


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: `offset` bytes into `file`."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: registry.DType

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.dtype.size


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its parsed header."""

    file: Path
    data_start: int
    header: dict[str, Any]
    slots: tuple[Slot, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `__metadata__`."""
        return dict(self.header.get("__metadata__", {}))


def read_json(path: Path) -> Any:
    """A JSON file; SourceError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise SourceError(f"{path}: is not JSON ({error}); get it again") from None


def read_shard(path: Path) -> Shard:
    """Parses and checks the header of a safetensors file.

    Raises:
        SourceError: it is no safetensors file, or damaged.
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


class Checkpoint(Mapping[str, Slot]):
    """Name -> `Slot`, of a safetensors file, a model's folder, or a pipeline's folder of such folders.

    In a pipeline a name is `component/name`, the component being the subfolder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = tuple(read_shard(file) for file in weight_files(root))
        self._slots: dict[str, Slot] = {}
        for shard in self.shards:
            prefix = "" if shard.file.parent == root or root.is_file() else f"{shard.file.parent.name}/"
            for slot in shard.slots:
                name = prefix + slot.name
                if name in self._slots:
                    raise SourceError(f"{root}: tensor {name!r} is in {self._slots[name].file} and in {shard.file}")
                self._slots[name] = slot

    def __getitem__(self, name: str) -> Slot:
        return self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def bits(self, name: str) -> Array:
        """The tensor's elements as a flat, read-only, mapped array of unsigned integers.

        Each call makes a map of its own, so that memory is one tensor's and not the model's.
        """
        slot = self._slots[name]
        if slot.nbytes == 0:
            return np.zeros(0, slot.dtype.bits)
        start = slot.offset - slot.offset % mmap.ALLOCATIONGRANULARITY
        length = slot.offset + slot.nbytes - start
        with open(slot.file, "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(mapped, np.uint8)[slot.offset - start :].view(slot.dtype.bits)

    def config(self, name: str) -> dict[str, Any]:
        """The config.json beside a tensor's file, or nothing."""
        path = self._slots[name].file.parent / "config.json"
        found = read_json(path) if path.exists() else {}
        return found if isinstance(found, dict) else {}


def index_file(folder: Path) -> Path | None:
    """The index of a sharded model in a folder: the plain one, or that of its only variant (`.index.fp16.json`)."""
    found = sorted(folder.glob("*" + _INDEX_SUFFIX)) or sorted(folder.glob(f"*{_INDEX_SUFFIX[:-5]}.*.json"))
    standard = [folder / (stem + _INDEX_SUFFIX) for stem in _STANDARD]
    return next((path for path in standard if path in found), found[0] if len(found) == 1 else None)


def weight_files(root: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        SourceError: there are none, or it is unclear which.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise SourceError(f"{root}: no such file or folder; check the path")
    # Beside the components of a pipeline there may lie one file with all of them, which nothing loads from there.
    files = [] if (root / "model_index.json").exists() else _weight_files_of(root)
    if not files:
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "."):
            files += _weight_files_of(folder)
    if not files:
        raise SourceError(f"{root}: holds no .safetensors weights; give a model's folder, saved as safetensors")
    return files


def _weight_files_of(folder: Path) -> list[Path]:
    """As transformers and diffusers choose: the one file before an index, the plain name before variants."""
    found = sorted(folder.glob("*.safetensors"))
    for stem in _STANDARD:
        if folder / f"{stem}.safetensors" in found:
            return [folder / f"{stem}.safetensors"]
    index = index_file(folder)
    if index is not None:
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard outside the folder")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SourceError(f"{index}: is not an index of shards ({error}); get it again") from None
        return [folder / name for name in names]
    if len(found) > 1:
        names_found = ", ".join(path.name for path in found[:4])
        raise SourceError(f"{folder}: several weight files ({names_found}, ...) and no index; keep one in the folder")
    return found


def other_weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Further weights beside a checkpoint's: variants (fp16), other formats, which a loader may take instead."""
    used = {shard.file for shard in checkpoint.shards}
    folders = sorted({file.parent for file in used})
    beside = (path for folder in folders for path in sorted(folder.iterdir()))
    return [path for path in beside if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt") and path not in used]


def tied_slot(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> str | None:
    """The name under which a tied output embedding is stored, if `name` is one that the files leave out."""
    component, _, leaf = name.rpartition("/")
    if not leaf.endswith(("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")):
        return None
    inputs = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    found = [
        other
        for other, slot in checkpoint.items()
        if other.endswith(inputs) and other.rpartition("/")[0] == component and slot.shape == shape
    ]
    if len(found) == 1 and checkpoint.config(found[0]).get("tie_word_embeddings", True):
        return found[0]
    return None


def match_names(wanted: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, str]:
    """wanted name -> name in the checkpoint, for those that can be found.

    As `rename_all`; output embeddings that are tied to the input's are found there.

    Args:
        wanted: name -> shape.
        checkpoint: where to look.
    """
    best = rename_all(wanted, checkpoint)
    for name, shape in wanted.items():
        if name not in best and (tied := tied_slot(checkpoint, name, shape)) is not None:
            best[name] = tied
    return best


def rename_all(wanted: Collection[str], have: Collection[str]) -> dict[str, str]:
    """wanted name -> name among those there are, for those that can be found.

    Names are taken as they are; if some are missing, one prefix is added to, or taken from, all of them
    (`bert.encoder...` for `encoder...`), whichever finds most.
    """
    best: dict[str, str] = {}
    for rename in _renamings(wanted, have):
        found = {name: other for name in wanted if (other := rename(name)) is not None and other in have}
        if len(found) > len(best):
            best = found
    return best


@dataclass(frozen=True)
class _Rename:
    """Takes one prefix away and puts another in its place."""

    away: str = ""
    put: str = ""

    def __call__(self, name: str) -> str | None:
        return self.put + name[len(self.away) :] if name.startswith(self.away) else None


def _renamings(wanted: Collection[str], have: Collection[str]) -> list[_Rename]:
    """The identity, and the few prefixes that would find the most missing names."""
    missing = dict.fromkeys(name for name in wanted if name not in have)
    finds: Counter[_Rename] = Counter()
    if missing:
        finds.update(_Rename(put=head) for other in have for head, tail in _tails(other) if tail in missing)
        finds.update(_Rename(away=head) for name in missing for head, tail in _tails(name) if tail in have)
    return [_Rename(), *(rename for rename, _ in finds.most_common(_TRIED))]


def _tails(name: str) -> Iterator[tuple[str, str]]:
    """The name cut in two, after every separator."""
    return ((name[: cut.end()], name[cut.end() :]) for cut in re.finditer("[./]", name))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path.  Raises SourceError."""
    try:
        return Checkpoint(Path(path))
    except OSError as error:
        raise ShiraDeltaError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
