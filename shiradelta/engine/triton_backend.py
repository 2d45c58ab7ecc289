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
from shiradelta.engine.live_backend import Held, Layer, Patch, Place, only_strengths_differ, stacks_of
from shiradelta.engine.torch_backend import Sections, TorchBackend
from shiradelta.reader import StoredTensor

#: Warps of a program, whose lanes are 2,048.  More hide more of the scattered writes; of those measured the fastest.
_WARPS = 16
#: Programs a processor, where what they have at hand is to stay in the cache.
_PROGRAMS = 2
#: Elements that a program of `stack_kernel` sums up at a time: as many as stay in the cache for all programs.
_REGION = 1 << 16
_BIG = 1 << 31
#: Stands for a pointer where a kernel is compiled and not run.
_ALIGNED = 1 << 40
#: Plans that an adapter keeps, the last that were used.
_PLANS = 16
_LAYER, _UNARY_BITS, _NNZ, _NUMEL = map(kernels.COLUMNS.index, ("layer", "unary_bits", "nnz", "numel"))
_LANES = kernels.BLOCK.value
#: Bytes a nonzero that a list of overlaps may take.
_OVERLAP = 0.1

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


#: What is on one tensor: (layer, patch), in the order in which it counts.
_Stack = list[tuple[int, int]]


class _Launch(NamedTuple):
    """One launch.

    Attributes:
        layer: the number of the layer that it is for; -1 for several.
        patches: numbers of that layer's patches, or (layer, patch) [n, 2] of several.
        entries: int32 on the device; see the kernels' `work`.
        lists: int32 on the device, for `overlap_kernel`.
    """

    kind: _Kind
    layer: int
    patches: NDArray[np.int64]
    entries: torch.Tensor
    lists: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Plan:
    """How to put some layers on.

    Attributes:
        alone: launches for patches that are put on as if they were alone, layer after layer.
        overlaps: launches of `overlap_kernel`, for tensors that two of those are on.
        sums: launches of `stack_kernel`, for tensors that more layers are on.
        table: that of both, on the device.
        plain: stacks that plain torch does.
        pairs: stacks of `sums` that `overlap_kernel` may be quicker for.
    """

    alone: list[_Launch]
    overlaps: list[_Launch]
    sums: list[_Launch]
    table: torch.Tensor
    plain: list[_Stack]
    pairs: list[tuple[_Kind, _Stack]]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Of all patches of an adapter.

    Attributes:
        rows: of the kernels' table, int64 [patches, columns]; `table` is the same on the device.
        kinds: None for a patch that plain torch has to do.
        plans: of this adapter and others, by the serial numbers of all that are in them.
    """

    rows: NDArray[np.int64]
    table: torch.Tensor
    kinds: list[_Kind | None]
    serial: int = field(default_factory=lambda: next(_serials))
    plans: dict[tuple[int, ...], _Plan] = field(default_factory=dict)


class TritonBackend(TorchBackend):
    """A CUDA or ROCm device (or, in Triton's interpreter, the CPU)."""

    name = "triton"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1
        self._programs = _PROGRAMS * processors

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> Held:
        """With the table of pointers."""
        held = super().hold(source, tensors)
        rows = [_row(patch, held.span(number).start) for number, patch in enumerate(held.patches)]
        table = np.array(rows, np.int64).reshape(len(rows), len(kernels.COLUMNS))
        held.data = _Prepared(table, self._there(table), [_kind(patch) for patch in held.patches])
        self._compile(held)
        return held

    def _compile(self, held: Held) -> None:
        """The kernels of a switch, now and not within the first one: it may take half a second, once a machine."""
        for x in self._plan([Layer(held, 1, None)]).alone:
            onto = held.data.table, x.entries, _ALIGNED
            self._run(kernels.apply_kernel, x, *onto, 1.0, most=0, FILLED=False, **x.kind.values())
            self._run(kernels.restore_kernel, x, *onto, most=0, **x.kind.elements())

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> list[int]:
        """Fused where nothing is on the tensors yet."""
        if below:
            return super().fingerprints(held, below)
        sums = torch.zeros(len(held.patches), dtype=torch.int64, device=self.device)
        plan = self._plan([Layer(held, 1, None)])
        for x in plan.alone:
            self._run(kernels.fingerprint_kernel, x, held.data.table, x.entries, sums, **x.kind.elements())
        found = [value % (1 << 64) for value in sums.tolist()]
        for stack in plan.plain:
            for _, number in stack:
                found[number] = self._fingerprint_of(held.patches[number], [])
        return found

    # ------------------------------------------------------------------------------------- switching

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """One launch to the base and one from there, as a rule; one in all, if only the strength is another.

        (A single pass over the weights, in which a program went from block to block of the old adapter and through
        the blocks of the new one between them, was slower than these two: it decodes the new one twice.)
        """
        if not after:
            self.restore(before)
            return
        plan = self._plan(after)
        filled = only_strengths_differ(before, after) and not plan.plain
        if not filled:
            self.restore(before)
        for x in plan.alone:
            new = after[x.layer]
            onto = new.held.data.table, x.entries, new.room.data_ptr(), float(np.float32(new.strength))
            self._run(kernels.apply_kernel, x, *onto, FILLED=filled, **x.kind.values())
            new.filled[x.patches] = True
        if plan.sums or plan.overlaps:
            self._add_up(plan, after, filled)
        for stack in plan.plain:
            self.apply([Place(after[layer], number) for layer, number in stack])
        self._used([*before, *after])

    def restore(self, layers: Sequence[Layer]) -> None:
        """Fused where all patches are there.

        The last layer first: until `overlap_kernel` has run, what it has saved may be the result of those before it.
        """
        for layer in reversed(layers):
            if not layer.filled.all():
                super().restore([layer])
                continue
            plan = self._plan([layer])
            for x in plan.alone:
                held = layer.held.data.table, x.entries, layer.room.data_ptr()
                self._run(kernels.restore_kernel, x, *held, **x.kind.elements())
            for stack in plan.plain:
                for _, number in stack:
                    self.restore_one(Place(layer, number))
        self._used(layers)

    def _add_up(self, plan: _Plan, layers: Sequence[Layer], filled: bool) -> None:
        strengths = np.array([layer.strength for layer in layers], np.float32).view(np.int32).tolist()
        rooms = [layer.room.data_ptr() for layer in layers]
        memory = self._there(np.array([rooms, strengths], np.int64).T.copy())
        for x in plan.overlaps:
            assert x.lists is not None
            where = plan.table, x.entries, x.lists, x.lists.shape[1]
            self._run(kernels.overlap_kernel, x, *where, memory, FILLED=filled, **x.kind.values())
        if not plan.sums:
            return
        size = self._programs * _REGION
        sums = torch.full((size,), kernels.EMPTY.value, dtype=torch.int32, device=self.device)
        for x in plan.sums:
            work = plan.table, x.entries, len(x.entries), memory, sums
            self._run(
                kernels.stack_kernel, x, *work, most=self._programs, REGION=_REGION, FILLED=filled, **x.kind.values()
            )
            for layer, number in x.patches.tolist():
                layers[layer].filled[number] = True

    def _run(self, kernel: Any, launch: _Launch, *arguments: Any, most: int = _BIG, **kind: Any) -> None:
        """A program for each entry; at most so many.  With none it is only compiled."""
        grid = (min(len(launch.entries), most),)
        # Nothing may be contracted to a fused multiply-add.
        kernel[grid](*arguments, **kind, num_warps=_WARPS, enable_fp_fusion=False)

    # -------------------------------------------------------------------------------------- planning

    def _plan(self, layers: Sequence[Layer]) -> _Plan:
        """Made once for the same adapters; at its second use, pairs of them are looked through for overlaps."""
        plans: dict[tuple[int, ...], _Plan] = layers[0].held.data.plans
        key = tuple(layer.held.data.serial for layer in layers)
        plan = plans.pop(key, None)
        if plan is None:
            plan = self._new_plan(layers)
        elif plan.pairs:
            plan = self._new_plan(layers, self._overlaps(plan.pairs, layers))
        if len(plans) >= _PLANS:
            del plans[next(iter(plans))]
        plans[key] = plan
        return plan

    def _new_plan(self, layers: Sequence[Layer], overlaps: _Overlaps | None = None) -> _Plan:
        """Without `overlaps`, pairs are summed as larger stacks are."""
        numbers = {id(layer): number for number, layer in enumerate(layers)}
        alone: list[tuple[tuple[_Kind, int], int]] = []
        sums: list[tuple[_Kind, _Stack]] = []
        plain: list[_Stack] = []
        for places in stacks_of(layers).values():
            stack = [(numbers[id(layer)], number) for layer, number in places]
            kinds = {layers[layer].held.data.kinds[number] for layer, number in stack}
            kind = kinds.pop() if len(kinds) == 1 else None
            if kind is None or (len(stack) > 1 and kind.codec == kernels.BITS.value):
                plain.append(stack)
            elif len(stack) > 1 and not (overlaps and _is_pair(kind, stack)):
                sums.append((kind, stack))
            else:
                alone += [((kind, layer), number) for layer, number in stack]
        table = _Table(layers)
        summing = [self._sums(kind, stacks, table) for kind, stacks in _groups(sums)]
        meeting = [self._meetings(kind, found, table) for kind, found in _groups(overlaps or [])]
        launches = sorted((self._launch(*group, layers) for group in _groups(alone)), key=lambda x: x.layer)
        pairs = [one for one in sums if _is_pair(*one)] if overlaps is None else []
        return _Plan(launches, meeting, summing, self._there(table.array()), plain, pairs)

    def _launch(self, key: tuple[_Kind, int], patches: Sequence[int], layers: Sequence[Layer]) -> _Launch:
        """A program for each block of patches of a layer."""
        kind, layer = key
        numbers = np.array(patches, np.int64)
        blocks = -(-layers[layer].held.data.rows[numbers, _UNARY_BITS] // wire.BLOCK_BITS)
        return _Launch(kind, layer, numbers, self._there(_entries(numbers[:, None], blocks)))

    def _sums(self, kind: _Kind, stacks: Sequence[_Stack], table: _Table) -> _Launch:
        """An entry for each region of each stack."""
        columns = np.array([(table.add(stack), len(stack)) for stack in stacks], np.int64)
        regions = np.array([-(-table.rows[first][_NUMEL] // _REGION) for first, _ in columns.tolist()], np.int64)
        patches = np.array([place for stack in stacks for place in stack], np.int64)
        return _Launch(kind, -1, patches, self._there(_entries(columns, regions)))

    def _overlaps(self, pairs: Sequence[tuple[_Kind, _Stack]], layers: Sequence[Layer]) -> _Overlaps:
        """Where pairs overlap; nothing if that is too much to keep."""
        found, left = [], _OVERLAP * sum(layer.held.data.rows[:, _NNZ].sum() for layer in layers)
        for kind, stack in pairs:
            one, other = (self.positions(layers[layer].held.patches[number]) for layer, number in stack)
            slot = torch.searchsorted(one, other).clamp_(max=len(one) - 1)
            second = (one[slot] == other).nonzero()[:, 0]
            found.append((kind, (stack, torch.stack([other[second], slot[second], second]).int())))
            left -= found[-1][1][1].nbytes
            if left < 0:
                return []
        return found

    def _meetings(self, kind: _Kind, found: Sequence[tuple[_Stack, torch.Tensor]], table: _Table) -> _Launch:
        """An entry for each 2,048 elements that the adapters of a pair share."""
        entries, start = [], 0
        for stack, shared in found:
            first, count = table.add(stack), shared.shape[1]
            entries += [(first, start + i, min(_LANES, count - i)) for i in range(0, count, _LANES)]
            start += count
        patches = np.array([place for stack, _ in found for place in stack], np.int64)
        work = np.array(entries, np.int32).reshape(-1, 3)
        return _Launch(kind, -1, patches, self._there(work), torch.cat([shared for _, shared in found], 1))

    def _there(self, array: NDArray[Any]) -> torch.Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


#: (kind, (stack of two, int32 [3, n]: see `overlap_kernel`)), one a tensor.
_Overlaps = list[tuple[_Kind, tuple[_Stack, torch.Tensor]]]


class _Table:
    """Rows of several layers' patches."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.rows: list[NDArray[np.int64]] = []

    def add(self, stack: _Stack) -> int:
        """Its first row."""
        first = len(self.rows)
        for layer, number in stack:
            row = self._layers[layer].held.data.rows[number].copy()
            row[_LAYER] = layer
            self.rows.append(row)
        return first

    def array(self) -> NDArray[np.int64]:
        """All of them."""
        return np.array(self.rows, np.int64)


def _is_pair(kind: _Kind, stack: _Stack) -> bool:
    """Whether `overlap_kernel` can do it."""
    return len(stack) == 2 and not kind.big


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
