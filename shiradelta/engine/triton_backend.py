"""The fused backend: every tensor of a device in one launch.

Contiguous tensors go through the kernels; strided ones, and tensors onto which several adapters put more than sums of
one codec, take the way of plain torch operations.  A switch is short, so whatever does not depend on memory or
strength is prepared once and kept: tables of pointers, and lists of what each program does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta import wire
from shiradelta.codecs.base import Bytes
from shiradelta.engine import triton_kernels as kernels
from shiradelta.engine.live import Target
from shiradelta.engine.live_backend import Held, Layer, Patch, Place, stacks_of
from shiradelta.engine.torch_backend import Sections, TorchBackend
from shiradelta.reader import StoredTensor

#: Warps of a program, whose lanes are 2,048.  More hide more of the scattered writes; of those measured the fastest.
_WARPS = 16
#: Programs a processor, where what they have at hand is to stay in the cache.
_PROGRAMS = 2
_MOVE_PROGRAMS = 2
#: Elements that a program of `stack_kernel` sums up at a time: as many as stay in the cache for all programs.
_REGION = 1 << 16
_BIG = 1 << 31
#: Plans that an adapter keeps, the last that were used.
_PLANS = 16
_LAYER, _UNARY_BITS, _NUMEL = (kernels.COLUMNS.index(name) for name in ("layer", "unary_bits", "numel"))

Key = TypeVar("Key")
Item = TypeVar("Item")
_serials = count()


class _Kind(NamedTuple):
    """What a kernel is compiled for."""

    codec: int
    dtype: str
    size: int  # bytes of an element
    word: int  # bytes of a word of the directory
    big: bool  # positions pass 2^31

    def values(self) -> dict[str, Any]:
        """Of kernels that look at values."""
        return {"CODEC": self.codec, "DTYPE": self.dtype, **self.elements()}

    def elements(self) -> dict[str, Any]:
        """Of kernels that do not."""
        return {"SIZE": self.size, "WORD": self.word, "BIG": self.big}


class _Launch(NamedTuple):
    """One launch, of a switch from some layers to others.

    Attributes:
        old, new: numbers of the layers that it takes off and puts on; -1 for none.
        patches: numbers of the new layer's patches, or (layer, patch) [n, 2] where there are several.
        entries: int32 on the device; see the kernels' `work`.
    """

    kind: _Kind
    old: int
    new: int
    patches: NDArray[np.int64]
    entries: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Plan:
    """How to get from some layers to others.

    Attributes:
        restores, moves, applies, sums: launches of the kernels of these names.
        table: of the sums, the kernels' table on the device.
        restores_one: (layer, patch) that plain torch puts back.
        applies_one: stacks of (layer, patch) that plain torch puts on.
    """

    restores: list[_Launch]
    moves: list[_Launch]
    applies: list[_Launch]
    sums: list[_Launch]
    table: torch.Tensor
    restores_one: list[tuple[int, int]]
    applies_one: list[list[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Of all patches of an adapter.

    Attributes:
        rows: of the kernels' table, int64 [patches, columns]; `table` is the same on the device.
        kinds: None for a patch that plain torch has to do.
        plans: to this adapter, or from it, by the serial numbers of all that are in them.
    """

    rows: NDArray[np.int64]
    table: torch.Tensor
    kinds: list[_Kind | None]
    serial: int = field(default_factory=lambda: next(_serials))
    plans: dict[tuple[tuple[int, ...], ...], _Plan] = field(default_factory=dict)


class TritonBackend(TorchBackend):
    """A CUDA or ROCm device (or, in Triton's interpreter, the CPU)."""

    name = "triton"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1
        self._programs = _PROGRAMS * processors
        self._move_programs = _MOVE_PROGRAMS * processors
        self._sums: torch.Tensor | None = None

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> Held:
        """With the table of pointers."""
        held = super().hold(source, tensors)
        rows = [_row(patch, held.span(number).start) for number, patch in enumerate(held.patches)]
        table = np.array(rows, np.int64).reshape(len(rows), len(kernels.COLUMNS))
        held.data = _Prepared(table, self._there(table), [_kind(patch) for patch in held.patches])
        return held

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> list[int]:
        """Fused where nothing is on the tensors yet."""
        if below:
            return super().fingerprints(held, below)
        sums = torch.zeros(len(held.patches), dtype=torch.int64, device=self.device)
        plan = self._plan([], [Layer(held, 1, None)])
        for launch in plan.applies:
            _run(kernels.fingerprint_kernel, launch, held.data.table, launch.entries, sums, **launch.kind.elements())
        found = [value % (1 << 64) for value in sums.tolist()]
        for stack in plan.applies_one:
            for _, number in stack:
                found[number] = self._fingerprint_of(held.patches[number], [])
        return found

    # ------------------------------------------------------------------------------------- switching

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """In one pass over the weights, where one adapter follows another."""
        again = len(before) == len(after) > 0 and all(a.room is b.room for a, b in zip(before, after, strict=True))
        plan = self._plan([] if again else before, after)
        filled = again and not plan.applies_one
        if again and not filled:
            self.restore(before)
        self._take_off(plan, before)
        for x in plan.moves:
            old, new = before[x.old], after[x.new]
            count = len(x.entries)
            kernels.move_kernel[(min(count, self._move_programs),)](
                old.held.data.table,
                old.room.data_ptr(),
                new.held.data.table,
                x.entries,
                count,
                *_onto(new),
                **x.kind.values(),
                **_OPTIONS,
            )
            new.filled[x.patches] = True
        for x in plan.applies:
            new = after[x.new]
            onto = _onto(new)
            _run(kernels.apply_kernel, x, new.held.data.table, x.entries, *onto, FILLED=filled, **x.kind.values())
            new.filled[x.patches] = True
        self._add_up(plan, after, filled)
        for stack in plan.applies_one:
            self.apply([Place(after[layer], number) for layer, number in stack])
        self._used([*before, *after])

    def restore(self, layers: Sequence[Layer]) -> None:
        """Fused where all patches are there."""
        for layer in layers:
            if layer.filled.all():
                self._take_off(self._plan([layer], []), [layer])
            else:
                super().restore([layer])
        self._used(layers)

    def _take_off(self, plan: _Plan, before: Sequence[Layer]) -> None:
        for x in plan.restores:
            old = before[x.old]
            room = old.room.data_ptr()
            _run(kernels.restore_kernel, x, old.held.data.table, x.entries, room, **x.kind.elements())
        for layer, number in plan.restores_one:
            self.restore_one(Place(before[layer], number))

    def _add_up(self, plan: _Plan, after: Sequence[Layer], filled: bool) -> None:
        if not plan.sums:
            return
        if self._sums is None:
            size = self._programs * _REGION
            self._sums = torch.full((size,), kernels.EMPTY.value, dtype=torch.int32, device=self.device)
        layers = self._there(np.array([(x.room.data_ptr(), _bits(x.strength)) for x in after], np.int64))
        for x in plan.sums:
            count = len(x.entries)
            kernels.stack_kernel[(min(count, self._programs),)](
                plan.table,
                x.entries,
                count,
                layers,
                self._sums,
                REGION=_REGION,
                FILLED=filled,
                **x.kind.values(),
                **_OPTIONS,
            )
            for layer, number in x.patches.tolist():
                after[layer].filled[number] = True

    # -------------------------------------------------------------------------------------- planning

    def _plan(self, before: Sequence[Layer], after: Sequence[Layer]) -> _Plan:
        """Made once for the same adapters."""
        plans = (*before, *after)[0].held.data.plans
        key = tuple(tuple(layer.held.data.serial for layer in layers) for layers in (before, after))
        plan = plans.pop(key, None) or self._new_plan(before, after)
        if len(plans) >= _PLANS:
            del plans[next(iter(plans))]
        plans[key] = plan
        return plan

    def _new_plan(self, before: Sequence[Layer], after: Sequence[Layer]) -> _Plan:
        numbers = {id(layer): number for layers in (before, after) for number, layer in enumerate(layers)}
        old, new = (
            {
                target: [(numbers[id(layer)], number) for layer, number in stack]
                for target, stack in stacks_of(layers).items()
            }
            for layers in (before, after)
        )

        def kind_of(layers: Sequence[Layer], stack: Sequence[tuple[int, int]]) -> _Kind | None:
            """That of all of a stack, if they have one in common."""
            kinds = {layers[layer].held.data.kinds[number] for layer, number in stack}
            return kinds.pop() if len(kinds) == 1 else None

        restores, moves, applies, sums, restores_one, applies_one = [], [], [], [], [], []
        for target, stack in new.items():
            kind, below = kind_of(after, stack), old.get(target, [])
            if kind is None or (len(stack) > 1 and kind.codec == kernels.BITS.value):
                applies_one.append(stack)
            elif len(stack) > 1:
                sums.append((kind, stack))
            elif len(below) == 1 and kind_of(before, below) is not None:
                moves.append(((kind, below[0][0], stack[0][0]), (below[0][1], stack[0][1])))
                del old[target]
            else:
                applies.append(((kind, -1, stack[0][0]), (stack[0][1],)))
        for stack in old.values():
            for layer, number in stack:
                kind = before[layer].held.data.kinds[number]
                if kind is None:
                    restores_one.append((layer, number))
                else:
                    restores.append(((kind, layer, -1), (number,)))
        rows, summing = self._sum_launches(sums, after)
        return _Plan(
            [self._launch(*group, before[group[0][1]]) for group in _groups(restores)],
            [self._launch(*group, before[group[0][1]]) for group in _groups(moves)],
            [self._launch(*group, after[group[0][2]]) for group in _groups(applies)],
            summing,
            rows,
            restores_one,
            applies_one,
        )

    def _launch(self, key: tuple[_Kind, int, int], numbers: Sequence[tuple[int, ...]], blocks_of: Layer) -> _Launch:
        """A program for each block of the first of the patches in each entry, which are `blocks_of`'s."""
        columns = np.array(numbers, np.int64)
        blocks = -(-blocks_of.held.data.rows[columns[:, 0], _UNARY_BITS] // wire.BLOCK_BITS)
        return _Launch(*key, columns[:, -1], self._there(_entries(columns, blocks)))

    def _sum_launches(
        self, sums: Sequence[tuple[_Kind, list[tuple[int, int]]]], after: Sequence[Layer]
    ) -> tuple[torch.Tensor, list[_Launch]]:
        """(table, a launch for each kind): a row for each patch of each stack, an entry for each of its regions."""
        rows: list[NDArray[np.int64]] = []
        launches = []
        for kind, stacks in _groups(sums):
            columns, regions = [], []
            for stack in stacks:
                columns.append((len(rows), len(stack)))
                for layer, number in stack:
                    row = after[layer].held.data.rows[number].copy()
                    row[_LAYER] = layer
                    rows.append(row)
                regions.append(-(-rows[-1][_NUMEL] // _REGION))
            patches = np.array([place for stack in stacks for place in stack], np.int64)
            entries = _entries(np.array(columns, np.int64), np.array(regions, np.int64))
            launches.append(_Launch(kind, -1, -1, patches, self._there(entries)))
        return self._there(np.array(rows, np.int64)), launches

    def _there(self, array: NDArray[Any]) -> torch.Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


#: Nothing may be contracted to a fused multiply-add.
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}


def _run(kernel: Any, launch: _Launch, *arguments: Any, **kind: Any) -> None:
    """A program for each entry."""
    kernel[(len(launch.entries),)](*arguments, **kind, **_OPTIONS)


def _onto(layer: Layer) -> tuple[int, float]:
    """What the kernels need of a layer: where its room is, and its strength, which float32 holds."""
    return layer.room.data_ptr(), float(np.float32(layer.strength))


def _bits(strength: float) -> int:
    """Those of a float32."""
    return int(np.float32(strength).view(np.int32))


def _kind(patch: Patch) -> _Kind | None:
    if patch.record.nnz and not patch.target.tensor.is_contiguous():
        return None
    size = wire.DTYPE_OF_NAME[patch.dtype].size
    big = patch.record.numel >= _BIG
    return _Kind(int(patch.record.value_codec), patch.dtype, size, wire.word_size(patch.record.numel), big)


def _row(patch: Patch, room: int) -> tuple[int, ...]:
    """A row of the kernels' table."""
    sections: Sections = patch.data
    index, values = sections.index.data_ptr(), sections.values.data_ptr()
    return (
        index + wire.RICE_HEAD.size,
        index + sections.low,
        index + sections.unary,
        values + sections.codes,
        values,
        patch.target.tensor.data_ptr(),
        sections.k,
        sections.unary_bits,
        patch.record.nnz,
        patch.record.numel,
        room,
        0,
    )


def _entries(columns: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [sum of counts, columns + 1]: each row of `columns` with 0, 1, ..., up to its count."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([np.repeat(columns, counts, axis=0), within]).astype(np.int32)


def _groups(pairs: Iterable[tuple[Key, Item]]) -> list[tuple[Key, list[Item]]]:
    """(key, its items), in the order in which the keys come."""
    groups: dict[Key, list[Item]] = {}
    for key, item in pairs:
        groups.setdefault(key, []).append(item)
    return list(groups.items())
