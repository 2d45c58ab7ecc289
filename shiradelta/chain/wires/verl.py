"""verl's `delta_sharded` checkpoint engine: flushes of the elements that have changed.

verl broadcasts flushes and keeps none of them.  Here each is a file `flush-NNNNN.safetensors` of a folder, with the
tensors that verl's loader is called with: `__delta_spec__` is JSON, `__positions__` are absolute positions of four
bytes, `__values__` are elements of one dtype.  The JSON lists the parameters, each with its part of both, and has a
checksum: the XOR of all positions' bytes and, moved left by one bit, that of all values, as doubles or as integers of
64 bits.  Whether a flush is the last one is said beside it, here in the file's metadata.

The loader takes NaN for "unchanged" and knows only floats.  So tensors that get a NaN, and tensors of integers, are
written whole, in a flush of the encoding "dense", as verl sends all tensors at first.
Read in verl 0.9.1: verl/checkpoint_engine/delta_checkpoint_engine.py, verl/checkpoint_engine/delta_sync/encode.py and
verl/workers/rollout/sglang_rollout/delta_loader.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    sequence,
    target,
    text,
    viewed,
)
from shiradelta.chain.wires.registry import WIRES, Wire
from shiradelta.errors import DeltaError, SourceError
from shiradelta.format.arithmetic import Array, to_float32
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot, Unwritten, read_shard, write_tensors
from shiradelta.util.arrays import different
from shiradelta.util.files import os_errors

_SPEC, _POSITIONS, _VALUES = "__delta_spec__", "__positions__", "__values__"
_SPARSE, _DENSE = "indices", "dense"
_LAST = "is_last"
_WIDTH = 4
_MOST_ELEMENTS = 1 << 31
#: Dtypes of integers that torch's checksum knows.
_INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
_WINDOW = 1 << 20


@dataclass(frozen=True)
class FlushedPart:
    """Part of a tensor after the step; `positions` is None where it is all of it."""

    where: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    positions: Array | None
    values: Array


def checksum(positions: Array, values: Array, dtype: str) -> int:
    """What verl compares on both ends: `torch.hash_tensor` of both blobs.

    Args:
        positions: bytes.
        values: bits of elements.
        dtype: what the values are.
    """
    return _xor(positions, "uint8") ^ (_xor(values, dtype) << 1)


def _xor(bits: Array, dtype: str) -> int:
    found = np.uint64(0)
    for start in range(0, bits.size, _WINDOW):
        found ^= np.bitwise_xor.reduce(_wide(bits[start : start + _WINDOW], dtype))
    return int(found)


def _wide(bits: Array, dtype: str) -> Array:
    """Elements as doubles or as integers of 64 bits, by their bits."""
    if dtype in _INTEGERS:
        return bits.view(dtype).astype(np.int64).view(np.uint64)
    if dtype == "float64":
        return bits
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one, as in torch
        return to_float32(bits, dtype).astype(np.float64).view(np.uint64)


def _read(folder: Path, base: Checkpoint) -> Iterator[Change]:
    """The changes of a folder of flushes; each flush is compared with its checksum."""
    names = names_in(folder)
    if not names or names != [_file(i) for i in range(len(names))]:
        raise SourceError(f"{folder}: is no folder of {_file(0)}, {_file(1)}, ... alone; get the step again")
    parts: dict[str, list[FlushedPart]] = {}
    for number_, name in enumerate(names):
        is_last, found = _flush(folder / name)
        if is_last != (number_ == len(names) - 1):
            ending = "has flushes after its last one" if is_last else "has no last flush"
            raise SourceError(f"{folder}: {ending}; get the step again")
        for one in found:
            parts.setdefault(one.name, []).append(one)
    for tensor, pieces in parts.items():
        old = new = base.bits(target(pieces[0].where, tensor, base, pieces[0].dtype, pieces[0].shape).name)
        for piece in pieces:
            target(piece.where, tensor, base, piece.dtype, piece.shape)
            if piece.positions is None and piece.values.size != old.size:
                raise SourceError(f"{piece.where} has {piece.values.size:,} of {old.size:,} values; get the step again")
            new = piece.values if piece.positions is None else assigned(piece.where, new, piece.positions, piece.values)
        yield tensor, old, new


def _file(index: int) -> str:
    return f"flush-{index:05d}.safetensors"


def _flush(file: Path) -> tuple[bool, list[FlushedPart]]:
    """(whether it is the last one, its parts) of a flush."""
    shard = read_shard(file)
    slots = {slot.name: slot for slot in shard.slots}
    with described(str(file)):
        spec = json.loads(bits_of(_bytes(slots[_SPEC])).tobytes().decode())
        encoding, values = spec["encoding"], slots[_VALUES]
        if encoding not in (_SPARSE, _DENSE):
            raise ValueError(f"encoding {str(encoding)[:40]!r} is unknown; {_SPARSE} and {_DENSE} are known")
        if set(slots) != {_SPEC, _VALUES} | ({_POSITIONS} if encoding == _SPARSE else set()):
            raise ValueError(f"it has tensors {sorted(slots)}")
        raw = bits_of(_bytes(slots[_POSITIONS])) if encoding == _SPARSE else np.zeros(0, np.uint8)
        bits, dtype = bits_of(values), values.dtype.name
        if dtype not in INFINITY and dtype not in _INTEGERS:
            raise ValueError(f"it has values of dtype {dtype}")
        if type(spec["checksum"]) is not int or spec["checksum"] != checksum(raw, bits, dtype):
            raise ValueError("its checksum is wrong")
        parts, ends = [], (0, 0)
        for one in sequence(spec["params"]):
            found, ends = _part(file, one, encoding, raw, bits, dtype, ends)
            parts.append(found)
        if ends != (raw.size, bits.size):
            raise ValueError("it has more positions or values than its parameters")
        return {"True": True, "False": False}[shard.metadata[_LAST]], parts


def _bytes(slot: Slot) -> Slot:
    if slot.dtype.name != "uint8":
        raise ValueError(f"{slot.name} is {slot.dtype.name}, not bytes")
    return slot


def _part(
    file: Path, one: Any, encoding: str, raw: Array, bits: Array, dtype: str, ends: tuple[int, int]
) -> tuple[FlushedPart, tuple[int, int]]:
    """(a parameter's part, where the next one has to begin).

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    name, shape = text(one["name"]), tuple(map(number, sequence(one["shape"])))
    where = f"{file}: tensor {name!r}"
    if one["dtype"] != dtype:
        raise ValueError(f"tensor {name!r} is {str(one['dtype'])[:40]} among values of {dtype}")
    if (one["pos_start"], one["val_start"]) != ends:
        raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
    values, at = part(bits, one["val_start"], one["val_end"]), part(raw, one["pos_start"], one["pos_end"])
    if one["pos_width"] != _WIDTH:
        raise ValueError(f"tensor {name!r} has positions of {str(one['pos_width'])[:40]} bytes; {_WIDTH} are known")
    if encoding == _SPARSE and (dtype not in INFINITY or is_nan(values, dtype).any()):
        raise SourceError(f"{where} has values that verl takes for unchanged (NaN, or integers); get the step again")
    positions = viewed(at, "<i4") if encoding == _SPARSE else None
    return FlushedPart(where, name, shape, dtype, positions, values), (number(one["pos_end"]), number(one["val_end"]))


def _write(folder: Path, base: Checkpoint, changes: Iterable[Change]) -> None:
    """Writes one flush for each dtype, and one more for what has to be whole."""
    flushes: dict[tuple[str, str], list[FlushedPart]] = {}
    for name, old, new in changes:
        slot, at = base[name], different(old, new)
        dtype, where = slot.dtype.name, f"tensor {name!r}"
        if not at.size:
            continue
        if dtype not in INFINITY and dtype not in _INTEGERS:
            raise DeltaError(f"{where} is {dtype}, which verl has no checksum for; publish an anchor there")
        if old.size >= _MOST_ELEMENTS:
            raise DeltaError(
                f"{where} has {old.size:,} elements, and verl's positions are below 2^31; take another wire"
            )
        if dtype in _INTEGERS or is_nan(new[at], dtype).any():
            one = FlushedPart(where, name, slot.shape, dtype, None, new)
        else:
            one = FlushedPart(where, name, slot.shape, dtype, at, new[at])
        flushes.setdefault((_SPARSE if one.positions is not None else _DENSE, dtype), []).append(one)
    if not flushes:
        flushes[_SPARSE, "bfloat16"] = []
    with os_errors(folder):
        for number_, ((encoding, dtype), parts) in enumerate(sorted(flushes.items(), reverse=True)):
            _write_flush(folder / _file(number_), encoding, dtype, parts, number_ == len(flushes) - 1)


def _write_flush(file: Path, encoding: str, dtype: str, parts: list[FlushedPart], is_last: bool) -> None:
    bits = DTYPE_OF_NAME[dtype].bits
    at = [one.positions.astype("<i4").view(np.uint8) for one in parts if one.positions is not None]
    positions = np.concatenate([np.zeros(0, np.uint8), *at])
    values = np.concatenate([np.zeros(0, bits), *(one.values for one in parts)])
    params, pos_end, val_end = [], 0, 0
    for one in parts:
        pos_start, val_start = pos_end, val_end
        pos_end += 0 if one.positions is None else _WIDTH * one.positions.size
        val_end += one.values.size
        params.append(
            {
                "name": one.name,
                "dtype": dtype,
                "shape": list(one.shape),
                "pos_start": pos_start,
                "pos_end": pos_end,
                "pos_width": _WIDTH,
                "val_start": val_start,
                "val_end": val_end,
            }
        )
    dense = {"verify": False, _LAST: is_last} if encoding == _DENSE else {}
    spec = {"encoding": encoding, **dense, "params": params, "checksum": checksum(positions, values, dtype)}
    tensors = {_SPEC: ("uint8", np.frombuffer(json.dumps(spec).encode(), np.uint8)), _VALUES: (dtype, values)}
    if encoding == _SPARSE:
        tensors[_POSITIONS] = "uint8", positions
    with open(file, "w+b") as stream:
        write_tensors(
            stream,
            [
                Unwritten(name, (data.size,), DTYPE_OF_NAME[kind], lambda data=data: data)  # type: ignore[misc]
                for name, (kind, data) in tensors.items()
            ],
            {_LAST: str(is_last)},
        )


WIRES.add(Wire("verl", "flushes of verl's checkpoint engine delta_sharded", _read, _write, {}))
