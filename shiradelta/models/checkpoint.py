"""Checkpoints on disk: safetensors files, sharded models, and folders of models, as one mapping of named tensors.

Elements are seen as bit patterns, unsigned integers of the dtype's size, through a memory map.  What `convert` reads
may be pickles of PyTorch, too.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import ShiraDeltaError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.io.recognise import PICKLES, UNQUANTISED, Wanted, explain, is_patched, is_pickle
from shiradelta.models.names import Shape
from shiradelta.models.quantised import packing
from shiradelta.models.safetensors import Shard, Slot, read_shard
from shiradelta.models.sentence import LIST, SentenceModule, modules_of
from shiradelta.util.files import close_synced
from shiradelta.util.json_files import read_json
from shiradelta.util.mapping import map_file

#: Weight files of one model, by preference, as transformers and diffusers name them.
STANDARD = ("model", "diffusion_pytorch_model", "pytorch_model")
#: The end of a shard's name.
_SHARD = re.compile(r"-\d+-of-(?P<count>\d+)\.(?:safetensors|bin)$")
#: What ends the name of an index of shards, after the suffix of the shards.
_INDEX = ".index.json"
INDEX_SUFFIX = ".safetensors" + _INDEX
#: What is read from pickles where there are no safetensors.
_READS_PICKLES = (Wanted.SOURCE, Wanted.BASE)
#: Pickles that trainers write beside the weights, by their starts.
_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
#: How far the search for other folders goes that a message names: levels, folders a level, names.
_DEPTH, _WIDTH, _NAMED = 4, 50, 3
#: Bytes of a tensor that is read and not mapped.
_SMALL = 1 << 16 if hasattr(os, "pread") else 0
#: What lists the tensors in a folder of torch.distributed.checkpoint.
DISTCP = ".metadata"
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Checkpoint(Mapping[str, Slot]):
    """Name -> `Slot`, of a file, a model's folder, or a folder of such folders.

    In a pipeline a name is `component/name`, the component being the subfolder.  So it is in sentence-transformers'
    folders: `2_Dense/linear.weight`; the tensors of a module in the folder itself have plain names.

    Attributes:
        root: the file or folder.
        shards: the files.
        folders: what stands before the names of a folder's tensors ("unet/", or "" in a model's folder) -> the folder.
    """

    def __init__(self, root: Path, wanted: Wanted = Wanted.WEIGHTS) -> None:
        self.root = root
        self.shards = tuple(_read(file, wanted) for file in weight_files(root, wanted))
        self.folders: dict[str, Path] = {}
        self._slots: dict[str, Slot] = {}
        for shard in self.shards:
            within = Path() if root.is_file() else shard.file.parent.relative_to(root)
            prefix = "".join(f"{part}/" for part in within.parts)
            self.folders[prefix] = shard.file.parent
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

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def bits(self, name: str) -> Array:
        """The tensor's elements, as `bits_of` gives them."""
        return bits_of(self._slots[name])

    def config(self, name: str) -> dict[str, Any]:
        """The config.json beside a tensor's file; empty if there is none."""
        path = self._slots[name].file.parent / "config.json"
        found = read_json(path) if path.exists() else {}
        return found if isinstance(found, dict) else {}


def same_bits(one: Checkpoint, name: str, other: Checkpoint, its_name: str) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    here, there = one[name], other[its_name]
    if (here.shape, here.dtype) != (there.shape, there.dtype):
        return False
    a, b, step = one.bits(name), other.bits(its_name), 1 << 20
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, a.size, step))


def _read(file: Path, wanted: Wanted) -> Shard:
    if file.name == DISTCP and wanted in _READS_PICKLES:
        from shiradelta.models.distcp import read_distcp

        return read_distcp(file)
    if wanted not in _READS_PICKLES or not is_pickle(file):
        return read_shard(file)
    from shiradelta.models.pickles import read_pickle  # takes a while to import

    return read_pickle(file)


def bits_of(slot: Slot) -> Array:
    """A stored tensor's elements as a flat, read-only array of unsigned integers.

    Each call makes a map of its own, so that memory is one tensor's and not the model's.  A small tensor is read, which
    takes less time than a map.
    """
    if slot.read is not None:
        return slot.read()
    size = slot.nbytes
    if size == 0:
        return np.zeros(0, slot.dtype.bits)
    before = slot.offset % mmap.ALLOCATIONGRANULARITY
    descriptor = os.open(slot.file, _READ)  # `open` takes three times as long, which many small tensors notice
    try:
        if size <= _SMALL and len(content := os.pread(descriptor, size, slot.offset)) == size:
            return np.frombuffer(content, slot.dtype.bits)
        mapped = map_file(descriptor, slot.file, before + size, slot.offset - before)
    finally:
        close_synced(descriptor)
    return np.frombuffer(mapped, slot.dtype.bits, slot.numel, before)


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists.

    Raises:
        SourceError: it is no index, or lists files of other folders.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard outside the folder")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(f"{index}: is not an index of shards ({error}); get it again") from None
    return names


def index_file(folder: Path, suffix: str = ".safetensors") -> Path | None:
    """The index of a sharded model in a folder: the plain one, or that of its only variant (`.index.fp16.json`)."""
    end = suffix + _INDEX
    found = sorted(folder.glob("*" + end)) or sorted(folder.glob(f"*{end.removesuffix('.json')}.*.json"))
    standard = [folder / (stem + end) for stem in STANDARD]
    return next((path for path in standard if path in found), found[0] if len(found) == 1 else None)


def weight_files(root: Path, wanted: Wanted = Wanted.WEIGHTS) -> list[Path]:
    """The files that hold a model's weights: safetensors, or pickles where those may be read.

    Raises:
        SourceError: there are none, or it is unclear which.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        what = "not a regular file" if root.exists() else "no such file or folder"
        raise SourceError(f"{root}: {what}; check the path")
    if wanted in _READS_PICKLES and any(root.glob("*.distcp")) and not any(root.glob("*.safetensors")):
        return [root / DISTCP]
    index = root / "model_index.json"
    modules = modules_of(root)
    if modules is not None:
        files = [file for module in modules for file in _files_of_module(root, module, wanted)]
    elif index.exists():
        # Beside the components there may lie one file with all of them, which nothing loads from there.
        about = read_json(index)
        listed = set(about) if isinstance(about, dict) else set()
        folders = _subfolders(root)
        files = [file for folder in folders for file in _files_of_part(root, folder, folder.name in listed, wanted)]
    else:
        files = _weight_files_of(root, wanted)
        files = files or [file for folder in _subfolders(root) for file in _weight_files_of(folder)]
    if not files:
        deeper = _deeper(root)
        remedy = f"give the folder that is meant: {deeper}" if deeper else "give a model's folder, saved as safetensors"
        raise SourceError(f"{root}: holds no .safetensors weights{' itself' if deeper else ''}; {remedy}")
    return files


def _deeper(root: Path) -> str:
    """Some folders with weights far below a folder, such as a run's checkpoints, for a message."""
    found: list[str] = []
    level = _subfolders(root)
    for _ in range(_DEPTH):
        level = [folder for above in level[:_WIDTH] for folder in _subfolders(above)]
        found += [str(folder) for folder in level[:_WIDTH] if any(folder.glob("*.safetensors"))]
    return ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _files_of_part(root: Path, folder: Path, listed: bool, wanted: Wanted) -> list[Path]:
    """The weight files of a folder within a model's.

    Raises:
        SourceError: it is listed as a part of the model, and has its weights in another format.
    """
    if not listed:
        return _weight_files_of(folder)
    if folder != root and not is_patched(root) and (message := explain(folder, wanted)) is not None:
        raise SourceError(message)
    return _weight_files_of(folder, wanted)


def _files_of_module(root: Path, module: SentenceModule, wanted: Wanted) -> list[Path]:
    """The weight files of a module of sentence-transformers'.

    Raises:
        SourceError: it has its weights in another format, or lacks them.
    """
    folder = root / module.path
    files = _files_of_part(root, folder, True, wanted)
    if module.has_weights and not files and not is_patched(root):
        others = sorted(path for path in folder.glob("*.*") if path.suffix != ".json")
        raise SourceError(
            next(filter(None, (explain(path, wanted) for path in others)), None)
            or f"{folder}: has no .safetensors weights, and {LIST} lists it as {module.kind}; get its files, too"
        )
    return files


def _weight_files_of(folder: Path, wanted: Wanted = Wanted.WEIGHTS) -> list[Path]:
    """The files that transformers and diffusers would load: one file before an index, plain names before variants."""
    found, suffix = sorted(folder.glob("*.safetensors")), ".safetensors"
    if not found and wanted in _READS_PICKLES and index_file(folder) is None:
        found, suffix = _pickles_of(folder), ".bin"
    for stem in STANDARD:
        if folder / f"{stem}{suffix}" in found:
            return [folder / f"{stem}{suffix}"]
    index = index_file(folder, suffix)
    if index is not None:
        return [folder / name for name in shards_of(index)]
    if len(found) > 1:
        names_found = ", ".join(path.name for path in found[:4])
        raise SourceError(f"{folder}: several weight files ({names_found}, ...) and no index; keep one in the folder")
    for path in found:
        part = _SHARD.search(path.name)
        if part is not None and int(part["count"]) > 1:
            raise SourceError(
                f"{path}: is one of {int(part['count'])} shards, and no index lists them; get all of them"
            )
    return found


def _pickles_of(folder: Path) -> list[Path]:
    """The pickles that may be a folder's weights; where subfolders have weights, those under their standard names."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []  # git keeps no folder of a module without files
    found = [path for path in inside if path.suffix in PICKLES and path.is_file()]
    if any(folder.glob("*/*.safetensors")):
        return [path for path in found if path.stem.startswith(STANDARD) and path.suffix == ".bin"]
    return [path for path in found if not path.stem.startswith(_STATES)]


def other_weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Other weight files in the same folders (fp16 variants, other formats), which a loader may prefer."""
    used = {shard.file for shard in checkpoint.shards}
    folders = sorted({file.parent for file in used} | ({checkpoint.root} if checkpoint.root.is_dir() else set()))
    beside = (path for folder in folders for path in sorted(folder.iterdir()))
    return [path for path in beside if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt") and path not in used]


def open_checkpoint(
    path: str | os.PathLike[str], wanted: Wanted = Wanted.WEIGHTS, *, packed: bool = False
) -> Checkpoint:
    """Opens the checkpoint at a path.

    Args:
        path: the file or folder.
        wanted: what it has to be; only what `convert` reads may be pickles.
        packed: whether only the stored bits count, so that they need not be weights (GPTQ and others).

    Raises:
        SourceError: there is none, it is damaged, or it is something else.
        ShiraDeltaError: the system refuses to read it.
        MissingDependencyError: it is a pickle, and torch is lacking or too old to read it.
    """
    if (message := explain(Path(path), wanted, packed=packed)) is not None:
        raise SourceError(message)
    try:
        found = Checkpoint(Path(path), wanted)
    except OSError as error:
        raise ShiraDeltaError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if packed or is_patched(Path(path)):  # deltas on it may be reverted
        return found
    if (how := packing(found)) is not None:
        raise SourceError(f"{path}: tensor {how[0]!r} is packed ({how[1]}), so its bits are not weights; {UNQUANTISED}")
    return found
