"""Dense changes of weights, as items of a source: at the base's own tensors, or at those it stores in another form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from shiradelta.models.checkpoint import Checkpoint

from .base_names import BaseTensors, find_tensors
from .item import Item, Skipped, SkipReason, Source, not_addable
from .lora_converted import Change, add_converted
from .sources import SourceFiles


def add_changes(
    files: SourceFiles, changes: Mapping[str, Change], called: Mapping[str, Sequence[str]], result: Source
) -> None:
    """Adds each change to a source, or the reason to skip it.

    Args:
        files: the files to convert.
        changes: by the names of the weights that they change.
        called: what else a user may call each of them, such as the keys of its parts.
        result: to add to.
    """
    base, there = files.base, BaseTensors({name: name for name in changes})
    if base is not None:
        shapes = {name: change.shape for name, change in changes.items()}
        there = find_tensors(shapes, base, lambda name: files.may_lack(name, *called[name]))
    taken: set[str] = set()
    for name in [name for name in changes if name not in there.converted]:
        result.add(name, _item(name, changes[name], there, base, taken))
    if base is not None:
        elsewhere = {name: change for name, change in changes.items() if name in there.converted}
        add_converted(elsewhere, there.converted, base, result)
    for name in changes.keys() & result.skipped.keys():
        change = changes[name]
        lost = result.skipped[name].called(*called[name], there.found.get(name))
        result.skipped[name] = lost.of_change(change.rows, change.shape)


def _item(name: str, change: Change, there: BaseTensors, base: Checkpoint | None, taken: set[str]) -> Item | Skipped:
    """The dense delta of one weight, or the reason to skip it."""
    if base is None:
        return Item(name, change.shape, "unspecified", change.rows)
    if name not in there.found:
        return there.lacking[name]
    found = there.found[name]
    slot = base[found]
    if slot.shape != change.shape:
        why = f"it changes a weight of shape {list(change.shape)}, the base's {found!r} has {list(slot.shape)}"
        return Skipped(SkipReason.PARTS, f"{why}; give the base that it was trained on")
    if found in taken or name in there.tied:
        return Skipped(SkipReason.CONFLICT, f"other layers change {found!r}, too")
    taken.add(found)
    bits = partial(base.bits, found)
    return not_addable(found, slot) or Item(found, change.shape, slot.dtype.name, change.rows, base_bits=bits)
