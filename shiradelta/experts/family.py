"""A family of deltas in a folder: `base.shd`, `expert-0.shd`, ..., and `family.safetensors`, which routes prompts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import FormatError, SourceError
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.io.reader import open_delta
from shiradelta.models.safetensors import Shard, Slot, Unwritten, read_shard, write_tensors
from shiradelta.util.arguments import checked
from shiradelta.util.files import replacing

FILE = "family.safetensors"
BASE = "base"
#: The version of the file that is written and read.
_FORMAT = "1"
_KEYS = {"checksum", "digests", "examples", "format", "seed"}
_CENTROIDS = "centroids"
_SCALES = "scales."
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ExpertFamily:
    """A family of deltas of one base model.

    Every member is a delta from the base model; an expert holds the base delta's values with what its cluster changed.
    So strengths of experts that sum to 1 give their weight average.

    Attributes:
        folder: where the files are.
        digests: member -> content digest of its file, hexadecimal; "base" first, then the experts.
        examples: number of examples that each expert was trained on.
        centroids: float32 [experts, dims], of length 1: the mean direction of each cluster's features.
        scales: the base delta's tensors -> int8 [nonzeros]: the power of two that a gradient is multiplied by, in place
            of Adam's 1 / (sqrt(v) + 1e-8); -128 for a factor of zero.
        seed: of the projection.
    """

    folder: Path
    digests: Mapping[str, str]
    examples: tuple[int, ...]
    centroids: Float32
    scales: Mapping[str, Array]
    seed: int

    @property
    def experts(self) -> list[str]:
        """The names of the experts, in the order of the centroids."""
        return [name for name in self.digests if name != BASE]

    def path(self, name: str) -> Path:
        """The file of a member."""
        return self.folder / f"{name}.shd"


def names_of(experts: int) -> list[str]:
    """The names of a family's members, the base's first."""
    return [BASE, *(f"expert-{number}" for number in range(experts))]


def write_index(family: ExpertFamily) -> None:
    """Writes the `family.safetensors` of a folder that has the members."""
    float32, int8 = DTYPE_OF_NAME["float32"], DTYPE_OF_NAME["int8"]
    centroids = family.centroids
    tensors = [Unwritten(_CENTROIDS, centroids.shape, float32, lambda: centroids)]
    for name, scales in family.scales.items():
        tensors.append(Unwritten(_SCALES + name, scales.shape, int8, lambda scales=scales: scales))  # type: ignore[misc]
    about = {
        "format": _FORMAT,
        "digests": json.dumps(list(family.digests.values())),
        "examples": json.dumps(list(family.examples)),
        "seed": str(family.seed),
    }
    about["checksum"] = _checksum(about, family)
    with replacing(family.folder / FILE) as stream:
        write_tensors(stream, tensors, about)


@checked()
def open_family(path: str | os.PathLike[str]) -> ExpertFamily:
    """Reads a family's folder, and checks every member: all its sections, and that it is the file that was trained.

    Args:
        path: the folder.

    Raises:
        SourceError: the folder is no family, a bit of its index is wrong, or a member is missing, damaged, another
            file's, or not listed.
    """
    folder = Path(path)
    index = folder / FILE
    if not index.is_file():
        raise SourceError(f"{folder}: has no {FILE}, so it is no family of experts; give the folder of one")
    shard = read_shard(index)
    digests, examples, seed = _about(shard)
    slots = {slot.name: slot for slot in shard.slots}
    centroids = _centroids(index, slots.pop(_CENTROIDS, None), len(digests) - 1)
    scales = {}
    for name, slot in slots.items():
        if not name.startswith(_SCALES) or slot.dtype.name != "int8" or len(slot.shape) != 1:
            raise _damaged(index, f"tensor {name!r} is {slot.dtype.name} {list(slot.shape)}")
        scales[name.removeprefix(_SCALES)] = _read(slot, "i1")
    family = ExpertFamily(folder, digests, examples, centroids, scales, seed)
    strangers = sorted({file.name for file in folder.glob("*.shd")} - {f"{name}.shd" for name in digests})
    if strangers:
        raise SourceError(f"{folder}: {strangers[0]} is not a member of this family; move it away")
    for name in digests:
        _check_member(family, name)
    if _checksum(shard.metadata, family) != shard.metadata["checksum"]:
        raise _damaged(index, "its contents are not those of its checksum")
    return family


def _checksum(about: Mapping[str, str], family: ExpertFamily) -> str:
    """SHA-256 of an index: its metadata, its centroids, and its scales with their names."""
    rest = {key: value for key, value in about.items() if key != "checksum"}
    heads = [rest, list(family.centroids.shape), {name: one.size for name, one in family.scales.items()}]
    found = hashlib.sha256(json.dumps(heads, sort_keys=True).encode())
    found.update(family.centroids.astype("<f4").tobytes())
    for _, scales in sorted(family.scales.items()):
        found.update(scales.tobytes())
    return found.hexdigest()


def _check_member(family: ExpertFamily, name: str) -> None:
    path = family.path(name)
    if not path.is_file():
        raise SourceError(f"{path}: is missing; copy the whole folder of the family")
    try:
        with open_delta(path) as delta:
            if delta.digest != family.digests[name]:
                raise SourceError(
                    f"{path}: is not the file that {FILE} lists (its digest begins with {delta.digest[:8]}, not"
                    f" {family.digests[name][:8]}); copy the whole folder of the family"
                )
            delta.verify()
            counts = {own: tensor.nnz for own, tensor in delta.items()}
            for own, tensor in delta.items():
                if not tensor.operation.adds:
                    raise SourceError(f"{path}: tensor {own!r} is {tensor.op}, not add; only additions can be averaged")
    except FormatError as error:
        raise SourceError(f"{error}; copy the whole folder of the family") from error
    if name == BASE and counts != {own: scales.size for own, scales in family.scales.items()}:
        raise _damaged(family.folder / FILE, f"its scales are not those of the nonzeros of {path.name}")


def _about(shard: Shard) -> tuple[dict[str, str], tuple[int, ...], int]:
    """(member -> digest, examples by expert, seed) of an index's metadata."""
    about, path = shard.metadata, shard.file
    if about.get("format", _FORMAT) != _FORMAT:
        raise SourceError(f"{path}: has format {about['format'][:20]!r}, and this release reads {_FORMAT}; update it")
    if set(about) != _KEYS:
        raise _damaged(path, f"its metadata is {', '.join(sorted(about)) or 'empty'}, not {', '.join(sorted(_KEYS))}")
    digests, examples, seed = _list(shard, "digests"), _list(shard, "examples"), about["seed"]
    if len(digests) < 2 or not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in digests):
        raise _damaged(path, "it does not list the digests of a base and of experts")
    if len(examples) != len(digests) - 1 or not all(type(one) is int and one >= 0 for one in examples):
        raise _damaged(path, "it does not list the number of examples of each expert")
    if re.fullmatch(r"-?[0-9]{1,40}", seed) is None:
        raise _damaged(path, "its seed is no number")
    return dict(zip(names_of(len(examples)), digests, strict=True)), tuple(examples), int(seed)


def _list(shard: Shard, key: str) -> Sequence[Any]:
    try:
        found = json.loads(shard.metadata[key])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise _damaged(shard.file, f"its {key} are no list")
    return found


def _centroids(path: Path, slot: Slot | None, experts: int) -> Float32:
    if slot is None or slot.dtype.name != "float32" or len(slot.shape) != 2 or slot.shape[0] != experts:
        raise _damaged(path, f"it has no float32 centroids of {experts} experts")
    found: Float32 = _read(slot, "<f4").reshape(slot.shape)
    lengths = np.sqrt(np.square(found.astype(np.float64)).sum(1))
    if not found.size or not np.allclose(lengths, 1, atol=1e-3):  # NaN is not close to anything
        raise _damaged(path, "its centroids are not of length 1")
    return found


def _read(slot: Slot, dtype: str) -> Array:
    return np.fromfile(slot.file, dtype, math.prod(slot.shape), offset=slot.offset)


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path}: is damaged ({what}); get it again")
