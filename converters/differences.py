"""Differences in a file: dense (LyCORIS' `.diff`, `.diff_b`, `.w_norm`, `.b_norm`, or plain names), or sparse.

Sparse layouts: PEFT's SHiRA (`MODULE.shira_weight`, `MODULE.shira_indices` [2, nnz]), and `NAME.values` with flat
`NAME.positions`.  A sparse difference is converted whole; nothing is selected from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array, Float32, to_float32
from shiradelta.format.delta import TensorDelta, matrix_shape
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import ADAPTER, PREFIX, parse_shira_key
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from .item import Item, Skipped, SkipReason, not_addable
from .lora_converted import Change

#: suffix of a file's key -> (suffix of the tensor's name, what the key holds)
_SUFFIXES = {
    ".values": ("", "values"),
    ".positions": ("", "positions"),
    ".diff": (".weight", "dense"),
    ".diff_b": (".bias", "dense"),
    ".w_norm": (".weight", "dense"),
    ".b_norm": (".bias", "dense"),
}


def parse_key(key: str) -> tuple[str, str] | None:
    """(tensor's name, what the key holds), or None for a plain key."""
    shira = parse_shira_key(key)
    if shira is not None:
        return shira
    key = key.removesuffix(ADAPTER)
    for suffix, (put, what) in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).removeprefix(PREFIX) + put, what
    return None


def dense_names(keys: Iterable[str]) -> dict[str, str]:
    """The keys of dense differences, by names that say so -> their tensors."""
    return {key: parsed[0] for key in keys if (parsed := parse_key(key)) is not None and parsed[1] == "dense"}


def holds_diffs(keys: Collection[str]) -> bool:
    """Whether a file with these keys holds differences: all keys say so, or some values come with their positions.

    One key is not enough: a model may have a tensor whose name ends in `.values`.
    """
    parsed = [parse_key(key) for key in keys]
    if parsed and all(parsed):
        return True
    held: dict[str, set[str]] = {}
    for name, what in filter(None, parsed):
        held.setdefault(name, set()).add(what)
    return any("values" in what and what & {"positions", "indices"} for what in held.values())


def lost_difference(source: Checkpoint, keys: Mapping[str, str], skipped: Skipped) -> Skipped:
    """A difference that is skipped, with its energy; `keys` say where its parts are."""
    key = keys.get("dense", keys.get("values"))
    if key is None or source[key].dtype.name not in ADD_DTYPES:
        return skipped
    return skipped.of_change(partial(_rows, source, key), source[key].shape)


def change_of(source: Checkpoint, key: str) -> Change:
    """The dense difference under a key."""
    return Change(partial(_rows, source, key), source[key].shape)


def difference(source: Checkpoint, key: str, name: str, base: Checkpoint) -> Item | Skipped:
    """The dense difference under a key, for the base's tensor `name`; or why it is skipped."""
    return item_of(source, {"dense": key}, name, base)


def item_of(source: Checkpoint, keys: Mapping[str, str], name: str, base: Checkpoint | None) -> Item | Skipped:
    """The difference whose parts are under some keys (see `parse_key`), for the tensor `name`; or why it is skipped."""
    for what, key in keys.items():
        dtype = source[key].dtype.name
        if dtype not in ADD_DTYPES and not (what in ("positions", "indices") and "int" in dtype):
            raise SourceError(f"{source.root}: {key!r} is {dtype}; differences are {', '.join(ADD_DTYPES)}")
    if "dense" in keys:
        slot = source[keys["dense"]]
        dense = partial(_rows, source, keys["dense"])
        if base is None:
            return Item(name, slot.shape, "unspecified", dense)
        if base[name].shape != slot.shape:
            why = f"its shape is {list(slot.shape)}, the base's {list(base[name].shape)}"
            return Skipped(SkipReason.SHAPE, why).of_change(dense, slot.shape)
        item = Item(name, slot.shape, base[name].dtype.name, dense, base_bits=partial(base.bits, name))
        return not_addable(name, base[name]) or item
    where = "positions" if "positions" in keys else "indices"
    if where not in keys or "values" not in keys:
        return Skipped(SkipReason.PARTS, f"only its {' '.join(keys)} is there")
    if base is None:
        why = "a sparse diff does not tell the tensor's shape; give --base MODEL"
        return Skipped(SkipReason.NEEDS_BASE, why)
    slot = base[name]
    item = Item(name, slot.shape, slot.dtype.name, exact=partial(_sparse, source, keys, where, name, base))
    return not_addable(name, slot) or item


def _rows(source: Checkpoint, key: str) -> Rows:
    """A dense difference, as the file has it."""
    slot = source[key]
    bits, dtype, columns = source.bits(key), slot.dtype.name, row_shape(slot.shape)[1]

    def rows(start: int, stop: int) -> Float32:
        return to_float32(bits[start * columns : stop * columns], dtype)

    return rows


def _integers(source: Checkpoint, key: str) -> Array:
    """Integers, which PEFT stores as float32 on Windows."""
    slot = source[key]
    bits = source.bits(key)
    if slot.dtype.name in ADD_DTYPES:
        numbers = to_float32(bits, slot.dtype.name)
        large = ~(np.abs(numbers) < 1 << 62)  # so is NaN
        if large.any() or not np.array_equal(numbers, np.floor(numbers)):
            raise SourceError(f"has {key!r} in {slot.dtype.name}, and not all of it are integers; get the file again")
        return numbers.astype(np.int64)
    return bits.view(np.dtype(slot.dtype.name).newbyteorder("<")).astype(np.int64)


def _sparse(source: Checkpoint, keys: Mapping[str, str], where: str, name: str, base: Checkpoint) -> TensorDelta:
    slot = base[name]
    indices = _integers(source, keys[where])
    values = to_float32(source.bits(keys["values"]), source[keys["values"]].dtype.name)
    if where == "indices":
        if indices.size % 2:
            held = count(indices.size, "index", "indices")
            raise SourceError(f"has {held}, which are no pairs; get the file again")
        row, column = indices.reshape(2, -1)
        if row.size and (row.min() < 0 or column.min() < 0 or column.max() >= matrix_shape(slot.shape)[1]):
            raise SourceError(f"has an index outside of shape {list(slot.shape)}; give the right base")
        indices = row * matrix_shape(slot.shape)[1] + column
    if indices.size != values.size:
        held = f"{count(indices.size, 'index', 'indices')} for {count(values.size, 'value')}"
        raise SourceError(f"has {held}; get the file again")
    if indices.size and (indices.min() < 0 or indices.max() >= slot.numel):
        raise SourceError(f"has an index outside of shape {list(slot.shape)}; give the right base")
    if not np.all(np.isfinite(values)):
        raise SourceError("has NaN or infinity in it; repair the source first")
    order = np.argsort(indices, kind="stable")
    indices, values = indices[order], values[order]
    if np.any(indices[1:] == indices[:-1]):
        raise SourceError("lists an index twice; get the file again")
    return TensorDelta(slot.shape, indices, values, slot.dtype.name, base_bits=base.bits(name)[indices])
