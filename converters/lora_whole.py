"""Tensors that a LoRA saves whole (PEFT's modules_to_save, biases, trained tokens), or as LyCORIS' differences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from shiradelta.format.arithmetic import to_float32
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint, same_bits
from shiradelta.models.peft import CONFIG, ORIGINAL_MODULE
from shiradelta.util.text import count

from . import full
from .differences import difference, lost_difference
from .item import NO_TARGET, Item, Skipped, SkipReason, Source, whole_tensor
from .lora_keys import TOKENS
from .lora_scale import Scale
from .whole import energy_of


def add_whole(
    source: Checkpoint,
    keys: Mapping[str, str],
    differences: Collection[str],
    names: Mapping[str, str],
    scale: Scale,
    base: Checkpoint | None,
    result: Source,
    tied: Mapping[str, str],
    shared: Mapping[str, Sequence[str]],
) -> None:
    """Adds the tensors that a LoRA saves whole: changed ones, and new ones where the LoRA means to add them.

    Args:
        source: the LoRA's checkpoint.
        keys: its keys that are no factors -> the name of the tensor that each may be.
        differences: those of the keys that hold a difference, as LyCORIS saves it beside its factors.
        names: tensor's name -> the base's name, where the base has it.
        scale: what the configuration says.
        base: the base's checkpoint, or None.
        result: where items and skipped tensors go.
        tied: tensor's name -> the base's tensor that it is tied to.
        shared: the base's tensors of which the library makes several -> the names of the others.
    """
    lost: dict[str, Skipped] = {}
    names = {name: found for name, found in names.items() if name not in tied}
    taken = dict.fromkeys((item.name for item in result.items), "")  # tensor -> the key that is its new value
    for key, name in sorted(keys.items(), key=lambda item: item[1] in tied):
        found = names.get(name)
        if ORIGINAL_MODULE in key:
            result.skipped[key] = Skipped(SkipReason.DUPLICATE, "the module as it was before")
        elif base is None:
            why = "saved whole; give --base to tell whether it is new or changed"
            lost[key] = Skipped(SkipReason.NEEDS_BASE, why)
        elif names.get(name, name) in taken:
            target = names.get(name, name)
            lost[key] = _second(source, key, taken[target], target, key in differences, base)
        else:
            item: Item | Skipped
            if TOKENS.match(key) and name in tied:
                item = _would_change(NO_TARGET, tied[name])
            elif TOKENS.match(key):
                item = _tokens(source, key, name, found, scale, base)
            elif key in differences:
                item = difference(source, key, found, base) if found else NO_TARGET
                if isinstance(item, Skipped):
                    item = lost_difference(source, {"dense": key}, item)
            elif name in tied:
                item = _tied(source, key, base, tied[name], taken.get(tied[name], ""))
            else:
                item = _whole(source, key, name, found, scale, base)
                if found is not None and found in shared and (isinstance(item, Item) or item.whole is not None):
                    same = [other for other, wanted in keys.items() if tied.get(wanted) == found]
                    item = _shared(source, key, item, same, shared[found])
            if isinstance(item, Skipped):
                lost[key] = item.called(name, found)
                item = item.whole or item
            else:
                result.items.append(item)
            if isinstance(item, Item):
                taken[item.name] = "" if key in differences else key
    result.skipped |= lost


def _second(source: Checkpoint, key: str, other: str, found: str, difference: bool, base: Checkpoint) -> Skipped:
    """A second change to a tensor; nothing is lost where it is the same as the first, or the base's own tensor."""
    if other and not difference and same_bits(source, key, source, other):
        return Skipped(SkipReason.DUPLICATE, f"the same as {other!r}")
    skipped = Skipped(SkipReason.CONFLICT, f"{found!r} is changed by other tensors here already", names=(found,))
    if difference:
        return lost_difference(source, {"dense": key}, skipped)
    return full.lost_change(skipped, full.difference(source, key, base, found) if found in base else None)


def _tokens(
    source: Checkpoint, key: str, name: str, found: str | None, scale: Scale, base: Checkpoint
) -> Item | Skipped:
    """Rows of an embedding, which the file holds as they are after training: the change that is added to the base."""
    rows = scale.tokens(name.removesuffix(".weight"))
    slot = source[key]
    if found is None:
        return NO_TARGET
    if rows is None:
        return Skipped(SkipReason.PARTS, f"{CONFIG} does not say which rows these are")
    shape, dtype = base[found].shape, base[found].dtype.name
    if slot.shape != (len(rows), *shape[1:]) or len(set(rows)) < len(rows) or max(rows, default=0) >= shape[0]:
        why = f"{found!r} of {list(shape)} does not have {count(rows, 'row')} of shape {list(slot.shape)}"
        return Skipped(SkipReason.PARTS, why)
    if slot.dtype.name not in ADD_DTYPES or dtype not in ADD_DTYPES:
        why = f"it is {slot.dtype.name}, the base's {dtype}, and nothing can be added to that exactly"
        return Skipped(SkipReason.DTYPE, why)

    def exact() -> TensorDelta:
        order = np.argsort(rows)
        positions = (np.array(rows)[order][:, None] * shape[1] + np.arange(shape[1])).reshape(-1)
        tuned = to_float32(source.bits(key), slot.dtype.name).reshape(len(rows), -1)[order].reshape(-1)
        bits = base.bits(found)[positions]
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            change = tuned - to_float32(bits, dtype)
        kept = np.flatnonzero(change)
        return TensorDelta(shape, positions[kept], change[kept], dtype, base_bits=bits[kept])

    return Item(found, shape, dtype, exact=exact)


def _whole(
    source: Checkpoint, key: str, name: str, found: str | None, scale: Scale, base: Checkpoint
) -> Item | Skipped:
    """A tensor saved whole: its change, or the tensor itself where the LoRA means to add it."""
    if found is not None:
        return full.difference(source, key, base, found)
    if scale.adds(name):
        return whole_tensor(source, key, name)
    why = f"the base has no such tensor, and no {CONFIG} says that it is new (modules_to_save)"
    return Skipped(SkipReason.NO_TARGET, why)


def _tied(source: Checkpoint, key: str, base: Checkpoint, tied: str, value: str) -> Skipped:
    """A tensor that the base ties to another, whose new value may be that of `value` in the source.

    Nothing is lost where it is the same, or as in the base.
    """
    if value and same_bits(source, key, source, value):
        return Skipped(SkipReason.DUPLICATE, f"the same as {value!r}")
    item = full.difference(source, key, base, tied)
    skipped = _would_change(item, tied)
    if isinstance(item, Item) and energy_of(skipped) == 0:
        return Skipped(SkipReason.DUPLICATE, f"the same as the base's {tied!r}")
    return skipped


def _shared(
    source: Checkpoint, key: str, item: Item | Skipped, same: Sequence[str], others: Sequence[str]
) -> Item | Skipped:
    """The change of a tensor that several layers share: all of them have to change alike."""
    if len(same) == len(others) and all(same_bits(source, key, source, other) for other in same):
        return item
    skipped = _would_change(item, " and ".join(others))
    return item if energy_of(skipped) == 0 else skipped


def _would_change(item: Item | Skipped, others: str) -> Skipped:
    why = f"the base ties it to {others!r}, which would change too; untie them in the base first"
    return full.lost_change(Skipped(SkipReason.NO_TARGET, why), item)
