"""Plans the launches of the fused backend: tables of pointers, and lists of work for each program.

Switches are short, so everything that does not depend on memory or strength is prepared once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.codecs.base import TorchDecoder
from shiradelta.format.operations import OPERATIONS
from shiradelta.hotswap.layers import Held, Layer, stacks_of, together
from shiradelta.hotswap.triton import elements, kernels, positions
from shiradelta.models.memory import is_array

#: Elements that a program of `stack_kernel` sums at a time; those of all programs fit into the cache.
REGION = 1 << 16
_BIG = 1 << 31
_LAYER, _UNARY_BITS, _NNZ, _NUMEL = (
    column.value for column in (positions.LAYER, positions.UNARY_BITS, positions.NNZ, positions.NUMEL)
)
_LANES = positions.BLOCK.value

Key = TypeVar("Key")
Item = TypeVar("Item")
_serials = count()


class Kind(NamedTuple):
    """The properties of a patch that its kernels are compiled for."""

    codec: int
    dtype: str
    size: int  # bytes of an element
    word: int  # bytes of a word of the directory
    big: bool  # positions pass 2^31
    order: int  # that elements are moved in; NO_ORDER if the operation does not shift

    def put(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel that applies a patch separately."""
        return {"ORDER": self.order, **self.values()}

    def values(self) -> dict[str, Any]:
        """Compile-time arguments of kernels that decode values."""
        return {"CODEC": self.codec, "DTYPE": self.dtype, **self.elements()}

    def elements(self) -> dict[str, Any]:
        """Compile-time arguments of kernels that only move elements."""
        return {"SIZE": self.size, "WORD": self.word, "BIG": self.big}


#: The patches on one tensor, as (layer, patch), in the order in which they take effect.
Stack = list[tuple[int, int]]
#: Elements that deltas of a stack share, one int32 [1 + how many share each, n] for each such number of deltas; see
#: `overlap_kernel`.
Shared = list[torch.Tensor]
#: Stack -> what its deltas share.
Overlaps = Mapping[tuple[tuple[int, int], ...], Shared]


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        layer: the number of the launch's only layer; -1 for several layers.
        patches: numbers of that layer's patches, or (layer, patch) [n, 2] for several layers.
        entries: int32 on the device; see the kernels' `work`.
        lists: int32 on the device, for `overlap_kernel`.
    """

    kind: Kind
    layer: int
    patches: NDArray[np.int64]
    entries: torch.Tensor
    lists: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The launches that apply some layers.

    Attributes:
        alone: launches for patches that are applied separately, layer after layer.
        overlaps: launches of `overlap_kernel`, for tensors with several separately applied patches.
        sums: launches of `stack_kernel`, for tensors with several patches that are summed.
        table: the table of `overlaps` and `sums`, on the device.
        plain: stacks that plain torch operations apply.
        searchable: stacks of `sums` for which `overlap_kernel` may be faster.
    """

    alone: list[Launch]
    overlaps: list[Launch]
    sums: list[Launch]
    table: torch.Tensor
    plain: list[Stack]
    searchable: list[Stack]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The device tables for all patches of one delta.

    Attributes:
        rows: rows of the kernels' table, int64 [patches, columns]; `table` is the same on the device.
        kinds: the kind of each patch; None if plain torch operations apply it.
        nonzeros: number of nonzeros of all patches.
        plans: plans that begin with this delta, by the serial numbers of their deltas.
    """

    rows: NDArray[np.int64]
    table: torch.Tensor
    kinds: list[Kind | None]
    nonzeros: int
    serial: int = field(default_factory=lambda: next(_serials))
    plans: dict[tuple[int, ...], Plan] = field(default_factory=dict)


#: Copies an array to the device, without waiting for it.
There = Callable[[NDArray[Any]], torch.Tensor]


def prepare(held: Held, there: There) -> Prepared:
    """Makes the tables of a delta, which do not depend on other deltas."""
    table = _rows(held)
    return Prepared(table, there(table), _kinds(held, table), int(table[:, _NNZ].sum()))


def new_plan(layers: Sequence[Layer], there: There, overlaps: Overlaps | None = None) -> Plan:
    """Plans the launches that apply layers.

    Args:
        layers: the layers, in the order of their digests.
        there: copies to the device.
        overlaps: those of the `searchable` stacks of an earlier plan of these layers that take little memory; None if
            they were not searched for.
    """
    kinds_of = [layer.held.data.kinds for layer in layers]
    single, stacks = _stacks(layers)
    alone: list[tuple[tuple[Kind, int], int]] = [
        ((kind, 0), number) for number in single if (kind := kinds_of[0][number]) is not None
    ]
    plain: list[Stack] = [[(0, number)] for number in single if kinds_of[0][number] is None]
    sums: list[tuple[Kind, Stack]] = []
    meeting: list[tuple[Kind, tuple[Stack, Shared]]] = []
    for stack in stacks:
        layer, number = stack[0]
        kind = kinds_of[layer][number]
        if len(stack) > 1 and any(kinds_of[layer][number] != kind for layer, number in stack):
            kind = None
        if kind is None or (len(stack) > 1 and kind.codec == elements.BITS.value):
            plain.append(stack)
        elif len(stack) > 1 and (not overlaps or tuple(stack) not in overlaps):
            sums.append((kind, stack))
        else:
            alone += [((kind, layer), number) for layer, number in stack]
            if overlaps and len(stack) > 1:
                meeting.append((kind, (stack, overlaps[tuple(stack)])))
    made = _Launches(layers, there)
    summing = [made.sum(kind, stacks) for kind, stacks in _groups(sums)]
    corrections = [made.overlap(kind, found) for kind, found in _groups(meeting)]
    launches = sorted((made.alone(*group) for group in _groups(alone)), key=lambda launch: launch.layer)
    searchable = [stack for kind, stack in sums if _is_searchable(kind, stack, layers)] if overlaps is None else []
    return Plan(
        launches,
        [launch for launch in corrections if len(launch.entries)],
        summing,
        there(np.array(made.rows, np.int64)),
        plain,
        searchable,
    )


def _stacks(layers: Sequence[Layer]) -> tuple[list[int], list[Stack]]:
    """The patches on each tensor that layers change: numbers of one layer's, if no tensor has two; otherwise stacks."""
    changing = np.flatnonzero(~layers[0].held.empty)
    if len(layers) == 1 and len(layers[0].held.targets) == changing.size:
        return changing.tolist(), []
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    return [], [[(numbers[id(layer)], number) for layer, number in stack] for stack in stacks_of(layers).values()]


class _Launches:
    """Makes the launches of a plan, and the table rows that they refer to."""

    def __init__(self, layers: Sequence[Layer], there: There) -> None:
        self._layers, self._there = layers, there
        self.rows: list[NDArray[np.int64]] = []

    def _add(self, stack: Stack) -> int:
        """Adds the rows of a stack; returns the index of the first one."""
        first = len(self.rows)
        for layer, number in stack:
            row = self._layers[layer].held.data.rows[number].copy()
            row[_LAYER] = layer
            self.rows.append(row)
        return first

    def alone(self, key: tuple[Kind, int], patches: Sequence[int]) -> Launch:
        """Applies patches of one layer separately, with one program per block."""
        kind, layer = key
        numbers = np.array(patches, np.int64)
        blocks = -(-self._layers[layer].held.data.rows[numbers, _UNARY_BITS] // registry.BLOCK_BITS)
        return Launch(kind, layer, numbers, self._there(_entries(numbers[:, None], blocks)))

    def sum(self, kind: Kind, stacks: Sequence[Stack]) -> Launch:
        """Sums stacks, with one entry per region of each stack."""
        columns = np.array([(self._add(stack), len(stack)) for stack in stacks], np.int64)
        regions = np.array([-(-self.rows[first][_NUMEL] // REGION) for first, _ in columns.tolist()], np.int64)
        return Launch(kind, -1, _numbers(stacks), self._there(_entries(columns, regions)))

    def overlap(self, kind: Kind, found: Sequence[tuple[Stack, Shared]]) -> Launch:
        """Corrects the elements that patches of each stack share, with one program per 2,048 elements."""
        entries, start = [], 0
        for stack, every in found:
            first = self._add(stack)
            for shared in every:
                rows, size = shared.shape
                entries += [(first, start + i, min(_LANES, size - i), rows - 1, size) for i in range(0, size, _LANES)]
                start += rows * size
        work = self._there(np.array(entries, np.int32).reshape(-1, 5))
        lists = [shared.reshape(-1) for _, every in found for shared in every]
        stacks = [stack for stack, _ in found]
        return Launch(kind, -1, _numbers(stacks), work, torch.cat(lists) if lists else None)


def _numbers(stacks: Sequence[Stack]) -> NDArray[np.int64]:
    """(layer, patch) of all stacks, [n, 2]."""
    return np.array([pair for stack in stacks for pair in stack], np.int64)


def _is_searchable(kind: Kind, stack: Stack, layers: Sequence[Layer]) -> bool:
    """Whether `overlap_kernel` can handle the stack: numbers of deltas and ranks fit into its words."""
    most = max(int(layers[layer].held.data.rows[number, _NNZ]) for layer, number in stack)
    return not kind.big and most <= kernels.RANK.value + 1 and len(stack) <= kernels.LAST_NUMBER.value + 1


def _kinds(held: Held, table: NDArray[np.int64]) -> list[Kind | None]:
    """The kind of each patch; None for one of a tensor that plain torch operations work on."""
    numels, shifting = table[:, _NUMEL].tolist(), {own.id for own in OPERATIONS.values() if own.shifts}
    shifts = [own in shifting for fits in held.fits for own in fits.rows["operation"].tobytes()]
    dtypes = list(chain.from_iterable([fits.dtypes for fits in held.fits]))
    found: list[Kind | None] = list(map(_kind_of, held.datas.codecs, dtypes, shifts, numels))
    plain = ~held.every.are_plain
    for number in np.flatnonzero(plain).tolist():
        if is_array(held.every[number].tensor) or not held.empty[number]:
            found[number] = None
    return found


@lru_cache(maxsize=256)  # tensors have few codecs, dtypes and sizes
def _kind_of(codec: TorchDecoder, dtype: str, shifts: bool, numel: int) -> Kind:
    order = int(registry.ORDERED[dtype]) if shifts else elements.NO_ORDER.value
    size = registry.DTYPE_OF_NAME[dtype].size
    return Kind(int(codec.id), dtype, size, registry.word_size(numel), numel >= _BIG, order)


def _rows(held: Held) -> NDArray[np.int64]:
    """The kernels' table, int64 [patches, columns]."""
    own, start = held.datas.columns, held.datas.buffer.data_ptr()  # all are in one buffer
    index, values = start + own["index_at"], start + own["values_at"]
    columns: dict[str, Any] = {
        "directory": index + registry.RICE_HEAD.size,
        "low": index + own["low"],
        "unary": index + own["unary"],
        "values": values + own["codes"],
        "parameters": values,
        "weight": held.every.addresses,
        "k": own["k"],
        "unary_bits": own["unary_bits"],
        "nnz": held.nonzeros,
        "numel": together([fits.numel for fits in held.fits]),
        "room": held.starts,
        "layer": 0,
    }
    table = np.empty((len(held.patches), len(positions.COLUMNS)), np.int64)
    for number, name in enumerate(positions.COLUMNS):
        table[:, number] = columns[name]
    return table


def _entries(columns: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [sum of counts, columns + 1]: each row of `columns`, repeated with 0, 1, ..., its count - 1."""
    starts = np.cumsum(counts) - counts
    found = np.repeat(np.column_stack([columns, -starts]).astype(np.int32), counts, axis=0)
    found[:, -1] += np.arange(len(found), dtype=np.int32)
    return found


def _groups(pairs: Iterable[tuple[Key, Item]]) -> list[tuple[Key, list[Item]]]:
    """Groups items by key: (key, its items), in order of first appearance."""
    groups: dict[Key, list[Item]] = {}
    for key, item in pairs:
        groups.setdefault(key, []).append(item)
    return list(groups.items())
