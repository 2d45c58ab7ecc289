"""Takes adapters out of a model that was distributed after they were put on it.

`fully_shard` and `parallelize_module` replace a model's tensors by DTensors, which have copies of the elements.  What a
session has saved of the tensors is made a delta that sets the base's elements, with fingerprints of what the session
left there.  It is loaded and put on the DTensors as any other, so each process takes the part that it has of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.hotswap.base_check import fit_of
from shiradelta.hotswap.devices import Layers, devices_for
from shiradelta.hotswap.layers import different_tensors
from shiradelta.hotswap.loaded import targets_of
from shiradelta.hotswap.outside import Watch
from shiradelta.hotswap.patched import PatchedWeights
from shiradelta.hotswap.prepare import Preparation
from shiradelta.hotswap.protocol import Overwritten
from shiradelta.hotswap.ranks import Ranks, ranks_for, with_those_elsewhere
from shiradelta.io.writer import writing_to
from shiradelta.models.live import Target, live_tensors
from shiradelta.models.memory import address_of, is_sharded, strides_of
from shiradelta.models.places import modules_of
from shiradelta.models.refusals import GATHERED, gathered_by_fsdp
from shiradelta.models.sharded import Spread
from shiradelta.models.views import Box, move
from shiradelta.util.arrays import merge_sorted

#: The call, for messages, and the name of the delta.
_WHAT, _SAVED = "revert()", "the saved elements"


class _Elements(NamedTuple):
    """Elements of a tensor that adapters have changed.

    Attributes:
        shape: the tensor's shape.
        dtype: its dtype, as deltas call it.
        positions: where the elements are, increasing.
        base: the base's bits there.
        present: those that the session left there.
    """

    shape: tuple[int, ...]
    dtype: str
    positions: Positions
    base: Array
    present: Array


class Distribution:
    """What a model has in the places of a session's tensors, if it was distributed since the session was made.

    Args:
        model: the model.
        targets: its tensors by name, as the session found them.
        backend: the session's choice of a backend.
        group: the process group that the session was given; None for the ranks of the DTensors.
        timeout: seconds to wait for a process.
    """

    def __init__(self, model: Any, targets: Mapping[str, Target], backend: str, group: Any, timeout: float) -> None:
        self._model, self._targets, self._backend = model, targets, backend
        self._group, self._timeout = group, timeout

    def is_there(self) -> bool:
        """Whether the model has DTensors, or what FSDP2 has gathered of some, in the places of other tensors."""
        gathered = self._gathered()
        others = (thing for target in self._leaves() for thing in target.now() if thing is not target.holder)
        return any(is_sharded(thing) or id(thing) in gathered for thing in others)

    def put_back(self, layers: Layers, watch: Watch, before: Ranks) -> None:
        """Puts the base's elements into what the model has now, in all processes or in none.

        Args:
            layers: those of the session, of all levels.
            watch: the session's.
            before: the processes of the session.

        Raises:
            TargetError: something else has written or replaced a tensor, or FSDP2 has gathered it; or another process
                refuses.
        """
        names = self._names()
        now = {name: thing for holder, every in names.items() for name, thing in every.items()}
        targets = live_tensors(now)
        ranks = ranks_for(targets, self._group, self._timeout)
        targets = with_those_elsewhere(targets, ranks)
        saved = ranks.agree(_WHAT, lambda: self._saved(layers, watch, names))
        if not before.alone:
            if not set(before.members) <= set(ranks.members):
                raise TargetError("the model was distributed over other processes than it was before; load it again")
            saved = _joined(ranks.gather(saved))
        if not saved:  # the adapters change nothing
            return
        devices = devices_for(targets.values(), self._backend)
        preparation = Preparation(targets, None, self._backend, devices)
        again = Watch(now)
        try:
            adapter = ranks.agree(
                _WHAT, lambda: preparation.read(_SAVED, _as_file(saved), None, False, (), None, None, nullcontext())
            )
            adapter = replace(adapter, label=_SAVED)
            fit_of(preparation, ranks, again, _WHAT, adapter, True, [])
        except BaseMismatchError as error:
            reason = str(error).partition(";")[0]  # what helps with files does not help here
            raise TargetError(
                f"the weights were changed since the model was distributed, or are others in another process"
                f" ({reason}); load the model's weights again"
            ) from None
        again.follow(targets_of([adapter]))
        weights = PatchedWeights(devices, again, ranks)
        weights.switch(lambda: [{_SAVED: 1.0}], _WHAT, {_SAVED: adapter}, devices.streams(None))
        weights.forget()

    def _gathered(self) -> set[int]:
        return {id(tensor) for root in modules_of(self._model) for tensor in gathered_by_fsdp(root)}

    def _names(self) -> dict[int, dict[str, Any]]:
        """What the model has now: id of a tensor that it had -> names, the same in all processes -> tensors.

        Tied weights may be several now.

        Raises:
            TargetError: FSDP2 has gathered one.
        """
        gathered = self._gathered()
        found: dict[int, dict[str, Any]] = {}
        taken: set[str] = set()
        for target in self._leaves():
            if id(target.holder) in found:
                continue
            distinct = {id(thing): thing for thing in target.now() if thing is not None}
            own = found[id(target.holder)] = {}
            for thing in distinct.values():
                if id(thing) in gathered:
                    raise TargetError(f"tensor {target.name!r} {replace(GATHERED, remedy='call reshard() first')}")
                name, number = target.name, 1
                while name in taken:
                    number += 1
                    name = f"{target.name} ({number})"
                taken.add(name)
                own[name] = thing
        return found

    def _leaves(self) -> Iterator[Target]:
        """The tensors of the model's own, and views of them, that the session could have written."""
        for top in self._targets.values():
            for target in (top, *top.forms.values()):
                yield from (leaf for leaf, _ in target.leaves() if leaf.refusal is None and leaf.holder is not None)

    def _saved(self, layers: Layers, watch: Watch, names: Mapping[int, Mapping[str, Any]]) -> dict[str, _Elements]:
        """What this process has saved, for each tensor that the model has now.

        Raises:
            TargetError: something else has written the tensors that the model had, or took them away.
        """
        for held in different_tensors(layers.values()):
            held.check_memory()
        watch.check_unwritten()
        found: dict[str, list[_Elements]] = {}
        for backend, every in layers.items():
            for one in backend.overwritten(every):
                some = _in_own_tensor(one)
                things = names.get(id(one.target.holder), {})
                if not things or any(tuple(thing.shape) != some.shape for thing in things.values()):
                    raise one.target.moved_error()
                for name in things:
                    found.setdefault(name, []).append(some)
        return {name: _merged(name, some) for name, some in found.items()}


def _in_own_tensor(one: Overwritten) -> _Elements:
    """Elements of a tensor in memory as those of the model's own tensor: a DTensor, where that is in parts."""
    target, holder = one.target, one.target.holder
    shape, dtype = tuple(holder.shape), one.dtype
    if is_sharded(holder):
        moved = [move(one.positions, view.weight, view.stored) for view in Spread().of(holder)]
        chosen = np.concatenate([np.arange(one.positions.size)[some] for some, _ in moved])
        positions = np.concatenate([where for _, where in moved])
        order = np.argsort(positions, kind="stable")
        chosen = chosen[order]
        return _Elements(shape, dtype, positions[order], one.base[chosen], one.present[chosen])
    positions = one.positions
    if target.view:
        tensor = target.tensor
        offset = (address_of(tensor) - address_of(holder)) // tensor.itemsize
        positions = Box(tuple(tensor.shape), strides_of(tensor), offset).positions(positions)
    return _Elements(shape, dtype, positions, one.base, one.present)


def _joined(every: Sequence[Mapping[str, _Elements]]) -> dict[str, _Elements]:
    """What all processes have saved."""
    names = dict.fromkeys(name for saved in every for name in saved)
    return {name: _merged(name, [saved[name] for saved in every if name in saved]) for name in names}


def _merged(name: str, some: Sequence[_Elements]) -> _Elements:
    """Elements of a tensor; those that are there several times are copies.

    Raises:
        TargetError: copies differ.
    """
    if len(some) == 1:
        return some[0]
    union, indices, _ = merge_sorted([one.positions for one in some])
    base, present = (np.empty(union.size, some[0].base.dtype) for _ in range(2))
    for one, at in zip(some, indices, strict=True):
        base[at], present[at] = one.base, one.present
    for one, at in zip(some, indices, strict=True):
        if not (np.array_equal(base[at], one.base) and np.array_equal(present[at], one.present)):
            raise TargetError(
                f"tensor {name!r} is in several places, and its elements are not the same in all; load the model's"
                " weights again"
            )
    return some[0]._replace(positions=union, base=base, present=present)


def _as_file(saved: Mapping[str, _Elements]) -> bytes:
    """A file that sets the base's elements where those are that the session left."""
    output = io.BytesIO()
    with writing_to(output) as writer:
        for name, (shape, dtype, positions, base, present) in sorted(saved.items()):
            writer.add(name, TensorDelta.trusted(shape, positions, base, dtype, "set", present))
    return output.getvalue()
