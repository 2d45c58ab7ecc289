"""A fine-tune in the form in which the base is stored, where the library that loads both reads either form.

One of the two may have the tensors as they are in memory, stacked or in pieces, and the other one as the library saves
them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted
from shiradelta.models.views import View

from .item import Skipped, SkipReason, Source

#: Pieces of a tensor: (the fine-tune's name, the elements that the two share).
_Pieces = list[tuple[str, View]]


class Reshaped(Checkpoint):
    """A fine-tune's tensors, some of them put together of others.

    Args:
        source: the fine-tune.
        made: the base's name of a tensor -> what it is put together of.
    """

    def __init__(self, source: Checkpoint, made: Mapping[str, _Pieces]) -> None:
        self.root, self.shards, self.folders = source.root, source.shards, source.folders
        used = {key for pieces in made.values() for key, _ in pieces}
        self._slots = {key: slot for key, slot in source.items() if key not in used}
        for name, pieces in made.items():
            read = partial(_put_together, source, pieces)
            self._slots[name] = replace(source[pieces[0][0]], name=name, shape=pieces[0][1].shape, read=read)


def _put_together(source: Checkpoint, pieces: _Pieces) -> Array:
    """The elements of a tensor of the base, flat, as a copy in memory."""
    key, view = pieces[0]
    whole = np.zeros(math.prod(view.shape), source[key].dtype.bits)
    for key, view in pieces:
        view.stored.of(whole)[...] = view.weight.of(source.bits(key))
    return whole


def in_form_of(
    base: Checkpoint, source: Checkpoint, converted: Mapping[str, Converted], result: Source
) -> tuple[Checkpoint, Collection[str]]:
    """Puts the fine-tune's tensors into the base's form.

    Args:
        base: the base.
        source: the fine-tune.
        converted: the fine-tune's names of tensors in another form -> where the base has their elements.
        result: where tensors go that cannot be converted.

    Returns:
        (the fine-tune with the tensors that were put together, their names).
    """
    pieces: dict[str, _Pieces] = {}
    for key, where in converted.items():
        for view in where.views:
            pieces.setdefault(view.name, []).append((key, view))
    made: dict[str, _Pieces] = {}
    refused: dict[str, Skipped] = {}
    for name, some in pieces.items():
        why = _problem(name, some, source, base)
        if why is None:
            made[name] = some
        else:
            refused |= {key: why for key, _ in some}
    # A tensor of which a part cannot be converted is left out whole.
    while broken := {name for name, some in made.items() if any(key in refused for key, _ in some)}:
        for name in broken:
            for key, _ in made.pop(name):
                refused.setdefault(key, Skipped(SkipReason.PARTS, f"other tensors of {name!r} are left out"))
    result.skipped |= refused
    return Reshaped(source, made), made


def _problem(name: str, pieces: _Pieces, source: Checkpoint, base: Checkpoint) -> Skipped | None:
    """Why a tensor of the base cannot be put together of the fine-tune's."""
    keys = {key for key, _ in pieces}
    some = ", ".join(map(repr, sorted(keys)[:2])) + (", ..." if len(keys) > 2 else "")
    if name in source and name not in keys:
        return Skipped(SkipReason.CONFLICT, f"the fine-tune has {name!r} as well, which is the same tensor; keep one")
    if base[name].shape != pieces[0][1].shape:
        why = f"the base's {name!r} has shape {list(base[name].shape)}, not {list(pieces[0][1].shape)}"
        return Skipped(SkipReason.SHAPE, f"{why}; resize the base's first")
    if len({source[key].dtype for key in keys}) > 1:
        return Skipped(SkipReason.DTYPE, f"{some} become {name!r} and are stored in several dtypes; save them in one")
    covered = np.zeros(base[name].numel, bool)
    for _, view in pieces:
        view.stored.of(covered)[...] = True
    if not covered.all():
        why = f"{some} are a part of the base's {name!r}, and the fine-tune lacks the rest"
        return Skipped(SkipReason.PARTS, f"{why}; save it whole")
    return None
