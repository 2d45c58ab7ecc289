"""Folders of fireworks-delta-compression, from which Fireworks' servers load the next weights.

A folder has a file for each of the model's, by the same name and with all of its tensors; each is a one-dimensional
uint8 tensor, its change (`arc`).  The metadata have the Adler-32 of each tensor afterwards.  What the format is called
is not in it; the payloads tell.
Read in fireworks-delta-compression 0.1.0, compression.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shiradelta.chain.wires.arc import arc_v1, arc_v2, arc_v3, checksum, decoded
from shiradelta.chain.wires.checks import Change, names_in
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import DeltaError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot, Unwritten, read_shard, write_tensors
from shiradelta.util.files import os_errors
from shiradelta.util.registry import Registry

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ArcFormat:
    """A format of payloads.

    Attributes:
        name: what Fireworks calls it.
        encode: (tensor, bits before, bits after) -> its payload.
    """

    name: str
    encode: Callable[[Slot, Array, Array], bytes]


FORMATS = Registry("format", (ArcFormat("arc_v3", arc_v3), ArcFormat("arc_v2", arc_v2), ArcFormat("arc_v1", arc_v1)))


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder."""
    wanted = sorted(shard.file.name for shard in base.shards)
    found = [name for name in names_in(folder) if name.endswith(_SUFFIX)]
    if found != wanted or set(base.folders) != {""}:
        raise SourceError(f"{folder}: has not the files of {base.root}; give the model before the step")
    for file in wanted:
        shard = read_shard(folder / file)
        before = {slot.name: slot for each in base.shards if each.file.name == file for slot in each.slots}
        slots = {slot.name: slot for slot in shard.slots}
        if slots.keys() != before.keys():
            name = min(slots.keys() ^ before.keys())
            where = f"{shard.file}: tensor {name!r}"
            raise SourceError(f"{where} is there or in {base.root} alone; give the model before the step")
        for name, slot in slots.items():
            where = f"{shard.file}: tensor {name!r}"
            if slot.dtype.name != "uint8" or len(slot.shape) != 1:
                raise SourceError(f"{where} is no row of bytes; get the step again")
            old, payload = base.bits(name), bits_of(slot).tobytes()
            yield name, old, decoded(where, payload, before[name], old, shard.metadata.get(name))


def _write(folder: Path, base: Checkpoint, changes: Iterable[Change], format: str) -> None:
    """Writes a file for each of the model's."""
    row = FORMATS.find(format)
    if set(base.folders) != {""}:
        raise DeltaError(
            f"{base.root} has models in folders, which the wire fireworks has no form for; take another wire"
        )
    payloads = {name: (row.encode(base[name], old, new), checksum(new)) for name, old, new in changes}
    for shard in base.shards:
        tensors, sums = [], {}
        for slot in shard.slots:
            if slot.name not in payloads:
                old = bits_of(slot)
                payloads[slot.name] = row.encode(slot, old, old), checksum(old)
            payload, sums[slot.name] = payloads[slot.name]
            data = np.frombuffer(payload, np.uint8)
            tensors.append(Unwritten(slot.name, (data.size,), DTYPE_OF_NAME["uint8"], lambda data=data: data))  # type: ignore[misc]
        with os_errors(folder), open(folder / shard.file.name, "w+b") as stream:
            write_tensors(stream, tensors, sums)


WIRES.add(
    Wire("fireworks", "folders of fireworks-delta-compression, arc_v1 to arc_v3", _read, _write, {"format": "arc_v3"})
)
