"""vLLM's sparse weight transfer, `sparse_nccl`, whose workers make a `CheckpointWeightPatch` of each tensor.

vLLM posts what comes and broadcasts it, and has no form for files.  Here `update_info.json` is the update info of the
request: names, dtypes, shapes and numbers of elements; `broadcasts.bin` has what is broadcast, one after the other: for
each tensor int32 positions, then as many elements.  vLLM takes NaN for "unchanged", and no dtype but floats.
Read in vLLM, October 2026: vllm/distributed/weight_transfer/sparse_nccl_engine.py and
vllm/model_executor/model_loader/checkpoint_weight_patch.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from shiradelta.chain.wires.checks import (
    INFINITY,
    Change,
    assigned,
    described,
    is_nan,
    names_in,
    number,
    part,
    read_bytes,
    sequence,
    target,
    text,
    viewed,
)
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import DeltaError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors
from shiradelta.util.json_files import read_json

_INFO, _DATA = "update_info.json", "broadcasts.bin"
_KEYS = ("names", "dtype_names", "shapes", "num_updates_list")
_MOST_ELEMENTS = 1 << 31


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder of two files."""
    if names_in(folder) != sorted((_INFO, _DATA)):
        raise SourceError(f"{folder}: is no folder of {_INFO} and {_DATA} alone; get the step again")
    info, data = read_json(folder / _INFO), np.frombuffer(read_bytes(folder / _DATA), np.uint8)
    patches: dict[str, list[tuple[Array, Array]]] = {}
    with described(str(folder)):
        rows = list(zip(*(sequence(info[key]) for key in _KEYS), strict=True))
    end = 0
    for one, dtype, shape, count in rows:
        with described(str(folder)):
            name, dtype = text(one), text(dtype)
        where = f"{folder / _DATA}: tensor {name!r}"
        if dtype not in INFINITY:
            raise SourceError(f"{where} is {dtype[:40]}; {', '.join(INFINITY)} are known")
        with described(where):
            target(where, name, base, dtype, tuple(map(number, sequence(shape))))
            middle = end + 4 * number(count)
            positions = viewed(part(data, end, middle), "<i4")
            end = middle + DTYPE_OF_NAME[dtype].size * number(count)
            values = viewed(part(data, middle, end), DTYPE_OF_NAME[dtype].bits)
        if is_nan(values, dtype).any():
            raise SourceError(f"{where} gets a NaN, which vLLM takes for unchanged; get the step again")
        patches.setdefault(name, []).append((positions, values))
    if end != data.size:
        raise SourceError(f"{folder / _DATA}: has {data.size:,} bytes for {end:,}; get the step again")
    for name, some in patches.items():
        old = new = base.bits(name)
        for positions, values in some:
            new = assigned(f"{folder / _DATA}: tensor {name!r}", new, positions, values)
        yield name, old, new


def _write(folder: Path, base: Checkpoint, changes: Iterable[Change]) -> None:
    """Writes the two files."""
    info: dict[str, list[object]] = {key: [] for key in _KEYS}
    blobs: list[bytes] = []
    for name, old, new in changes:
        at, slot = different(old, new), base[name]
        if not at.size:
            continue
        dtype, values = slot.dtype.name, new[at]
        if dtype not in INFINITY or is_nan(values, dtype).any():
            what = "NaN" if dtype in INFINITY else dtype
            raise DeltaError(f"tensor {name!r} gets {what}, which vLLM's patches have no form for; take another wire")
        if old.size >= _MOST_ELEMENTS:
            raise DeltaError(f"tensor {name!r} has {old.size:,} elements, and positions are int32; take another wire")
        for key, value in zip(_KEYS, (name, dtype, list(slot.shape), int(at.size)), strict=True):
            info[key].append(value)
        blobs += at.astype("<i4").tobytes(), values.tobytes()
    with os_errors(folder):
        (folder / _DATA).write_bytes(b"".join(blobs))
        (folder / _INFO).write_text(json.dumps(info))


WIRES.add(Wire("vllm", "requests and broadcasts of vLLM's sparse_nccl, of CheckpointWeightPatch", _read, _write, {}))
