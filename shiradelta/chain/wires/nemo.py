"""NeMo-RL's sparse refits of remote vLLM workers: payloads of changed elements, by S3 or ZeroMQ.

A payload is what `torch.save` makes of (bytes of positions, groups of values by size, a list of tensors), compressed by
zstd.  Positions are a range, or the gaps between them less one, in 2, 4 or 8 bytes each.  Values are the bits of
elements as integers: with the operation "xor" old ^ new, with "overwrite" the new ones.  NeMo-RL stores a payload as
`NNNNNN.pt` and sends a request that names it, with its BLAKE2b checksum of 16 bytes; here the request is
`NNNNNN.json` beside it, without the bucket.  XOR has to be applied exactly once, and nothing in it tells.
Read in NeMo-RL, August 2026: nemo_rl/utils/weight_transfer_sparse_codec.py and weight_transfer_stream.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.chain.wires.checks import (
    Change,
    assigned,
    described,
    inside,
    names_in,
    number,
    part,
    positions_of_gaps,
    read_bytes,
    sequence,
    target,
    text,
    unzipped,
    viewed,
)
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import ArgumentError, SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.pickles import loaded
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors
from shiradelta.util.json_files import read_json
from shiradelta.util.optional import importing

if TYPE_CHECKING:
    import torch

_XOR, _OVERWRITE = "xor", "overwrite"
_RANGE, _GAPS = "range", "deltas"
_CHECKSUM_SIZE = 16
_LEVEL = 1
#: Bytes of a payload that are neither positions nor values: for all of it, and for each tensor.
_AROUND, _EACH = 1 << 20, 4096


def checksum(body: bytes) -> str:
    """What a request says of a payload."""
    return hashlib.blake2b(body, digest_size=_CHECKSUM_SIZE).hexdigest()


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder of payloads, each with its request."""
    names = names_in(folder)
    requests = [name for name in names if name.endswith(".json")]
    if not requests or names != sorted(
        f"{name.removesuffix('.json')}{end}" for name in requests for end in (".json", ".pt")
    ):
        raise SourceError(f"{folder}: is no folder of 000000.pt, 000000.json, ... alone; get the step again")
    most = _AROUND + sum(_EACH + slot.numel * (8 + slot.dtype.size) for slot in base.values())
    seen: set[str] = set()
    for name in requests:
        request = read_json(folder / name)
        with described(str(folder / name)):
            file = inside(folder, text(request["key"]).rpartition("/")[2])
            if file.name != f"{name.removesuffix('.json')}.pt":
                raise ValueError(f"it names {file.name}")
            body = read_bytes(file)
            if request["checksum"] != checksum(body):
                raise ValueError(f"the checksum of {file.name} is another one")
        for change in _payload(str(file), unzipped(str(file), body, most), base):
            if change[0] in seen:
                raise SourceError(f"{file}: tensor {change[0]!r} is in the step twice; get the step again")
            seen.add(change[0])
            yield change


def _payload(where: str, raw: bytes, base: Checkpoint) -> Iterator[Change]:
    """The changes of one payload."""
    held = loaded(raw, where)
    with described(where):
        locations, groups, items = sequence(held)
        bytes_, values = _numpy(locations), [_numpy(group) for group in sequence(groups)]
        found = [_item(where, one, bytes_, values) for one in sequence(items)]
        ends = [0] * len(values)
        place = 0
        for item, one in zip(found, sequence(items), strict=True):
            if one["index_start"] != place or one["value_start"] != ends[one["value_group"]]:  # type: ignore[index]
                raise ValueError(f"tensor {item[0]!r} does not begin where the one before it ends")
            place, ends[one["value_group"]] = one["index_end"], one["value_end"]  # type: ignore[index]
        if (place, ends) != (bytes_.size, [group.size for group in values]):
            raise ValueError("it has more positions or values than its tensors")
    for name, dtype, shape, operation, positions, bits in found:
        called = f"{where}: tensor {name!r}"
        slot = target(called, name, base, dtype, shape)
        old = base.bits(name)
        if bits.itemsize != old.itemsize:
            raise SourceError(f"{called} has values of {bits.itemsize} bytes for {slot.dtype.name}; get the step again")
        new = assigned(called, old, positions, bits.view(old.dtype))
        if operation == _XOR:
            new[positions] ^= old[positions]
        yield name, old, new


def _numpy(tensor: Any) -> Array:
    """A flat tensor of integers.

    Raises:
        AttributeError, TypeError, ValueError: it is none.
    """
    found: Array = tensor.numpy()
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"a tensor of dtype {found.dtype}, shape {list(found.shape)}")
    return found


def _item(
    where: str, one: Any, locations: Array, groups: list[Array]
) -> tuple[str, str, tuple[int, ...], str, Array, Array]:
    """(name, dtype, shape, operation, positions, values) of a tensor.

    Raises:
        LookupError, TypeError, ValueError: what it says is damaged.
    """
    name, operation = text(one["name"]), one["operation"]
    if operation not in (_XOR, _OVERWRITE):
        raise ValueError(f"operation {str(operation)[:40]!r} is unknown; {_XOR} and {_OVERWRITE} are known")
    bits = part(groups[number(one["value_group"])], one["value_start"], one["value_end"])
    stored = part(locations, one["index_start"], one["index_end"])
    if one["index_encoding"] == _RANGE and not stored.size:
        positions = number(one["range_start"]) + np.arange(bits.size, dtype=np.int64)
    elif one["index_encoding"] == _GAPS and bits.size and stored.size in (2 * bits.size, 4 * bits.size, 8 * bits.size):
        positions = positions_of_gaps(viewed(stored, f"<u{stored.size // bits.size}"), 1)
    else:
        encoding = str(one["index_encoding"])[:40]
        raise ValueError(f"tensor {name!r} has {stored.size:,} bytes of {encoding!r} for {bits.size:,} values")
    shape = tuple(map(number, sequence(one["shape"])))
    return name, text(one["dtype"]), shape, operation, positions, bits


def _write(folder: Path, base: Checkpoint, changes: Iterable[Change], encoding: str) -> None:
    """Writes one payload and its request."""
    if encoding not in (_XOR, _OVERWRITE):
        raise ArgumentError(f"encoding {encoding!r} is unknown; take {_XOR}, {_OVERWRITE}")
    with importing("a step of NeMo-RL"):
        import torch
        import zstandard
    locations: list[Array] = [np.zeros(0, np.uint8)]
    groups: dict[int, list[Array]] = {}
    items: list[dict[str, Any]] = []
    end = 0
    for name, old, new in changes:
        at, slot = different(old, new), base[name]
        if not at.size:
            continue
        group = groups.setdefault(old.itemsize, [])
        start, value_start = end, sum(values.size for values in group)
        group.append((new[at] ^ old[at]) if encoding == _XOR else new[at])
        if at[-1] - at[0] + 1 == at.size:
            about: dict[str, Any] = {"index_encoding": _RANGE, "range_start": int(at[0])}
        else:
            locations.append(_gaps(at))
            end += locations[-1].size
            about = {"index_encoding": _GAPS}
        items.append(
            {
                "name": name,
                "shape": slot.shape,
                "dtype": slot.dtype.name,
                "operation": encoding,
                "index_start": start,
                "index_end": end,
                "value_group": list(groups).index(old.itemsize),
                "value_start": value_start,
                "value_end": value_start + at.size,
                **about,
            }
        )
    values = tuple(_integers(np.concatenate(parts)) for parts in groups.values())
    stream = io.BytesIO()
    torch.save((_integers(np.concatenate(locations)), values, items), stream)
    body = zstandard.ZstdCompressor(level=_LEVEL).compress(stream.getvalue())
    key = "000000.pt"
    request = {"key": key, "checksum": checksum(body), "verification_candidates": 0}
    with os_errors(folder):
        (folder / key).write_bytes(body)
        (folder / "000000.json").write_text(json.dumps(request))


def _gaps(positions: Array) -> Array:
    """The bytes of the gaps between positions, less one."""
    gaps = np.diff(positions, prepend=-1) - 1
    width = 2 if gaps.max() < 1 << 16 else 4 if gaps.max() < 1 << 32 else 8
    return gaps.astype(f"<u{width}").view(np.uint8)


def _integers(bits: Array) -> torch.Tensor:
    """Bits as torch has integers of their size: bytes, and signed ones."""
    import torch

    return torch.from_numpy(bits if bits.itemsize == 1 else bits.view(f"<i{bits.itemsize}"))


WIRES.add(Wire("nemo-rl", "payloads of NeMo-RL's sparse refits", _read, _write, {"encoding": _XOR}))
