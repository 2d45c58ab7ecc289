"""The nonzeros that each piece of memory has of a tensor: runs are cut out of its sections, others are moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.rice_cut import cut
from shiradelta.format.record import Record
from shiradelta.format.registry import IndexId
from shiradelta.io.reader import StoredTensor
from shiradelta.models.live import Target
from shiradelta.models.views import View, move, shift_between, show_nothing
from shiradelta.util.arrays import aligned, join_sorted, order_of


class Portion(NamedTuple):
    """The nonzeros that a piece of memory has of a tensor.

    Attributes:
        positions: there, increasing.
        bits: decodes their bits.
        sections: cuts their sections out of the tensor's, INDEX in RICE and VALUES, given the number of elements of the
            weight; None for one that has to be encoded anew.  None for nonzeros that are no run.
    """

    positions: Positions
    bits: Callable[[], Array]
    sections: Callable[[int], tuple[bytes | None, bytes | None]] | None = None


class _SharedRun(NamedTuple):
    """Neighbours of a stored tensor, from start to stop - 1, that are also neighbours in a weight.

    `shift` is what is added to their positions there.
    """

    start: int
    stop: int
    shift: int


def portions_of(
    tensor: StoredTensor, leaves: Sequence[tuple[Target, tuple[View, ...]]], is_partly_read: bool = False
) -> list[Portion]:
    """The nonzeros in each of a tensor's pieces of memory.

    What was read of a tensor in part is checked with what other processes have read (`shiradelta.hotswap.sections`).
    """
    record = tensor.record
    # A part of another section is decoded from all of it, which is done once, in windows.
    has_runs = record.index_codec == IndexId.RICE and not (record.index.zstd or record.values.zstd)
    here = {number: views for number, (_, views) in enumerate(leaves) if not show_nothing(views)}
    runs = {number: run for number, views in here.items() if has_runs and (run := _run(views)) is not None}
    found = dict(zip(runs, _cut_out(tensor, list(runs.values()), is_partly_read), strict=True))
    others = {number: (views, views[0].stored.span) for number, views in here.items() if number not in runs}
    parts: list[list[tuple[Positions, Array]]] = [[] for _ in leaves]
    if others:
        for positions, bits in aligned(tensor.position_windows(), tensor.bits_windows()):
            for number, (views, (start, stop)) in others.items():
                if positions[0] < stop and positions[-1] >= start:
                    parts[number].append(_moved(positions, bits, views))
    return [found[number] if number in found else _gathered(some) for number, some in enumerate(parts)]


def joined(portions: Sequence[Portion]) -> Portion:
    """Portions of several tensors in one weight.  Raises RepeatedPositionError."""
    return _portion(*join_sorted([(portion.positions, portion.bits()) for portion in portions]))


def _run(views: Sequence[View]) -> _SharedRun | None:
    """The elements that views show, if they are one run; None if not, or if there are several views."""
    if len(views) != 1:
        return None
    shift = shift_between(views[0].stored, views[0].weight)
    return None if shift is None else _SharedRun(*views[0].stored.span, shift)


def _cut_out(tensor: StoredTensor, runs: Sequence[_SharedRun], is_partly_read: bool) -> list[Portion]:
    """The nonzeros in runs of a tensor with a RICE section; neither section is compressed."""
    if not runs or not tensor.nnz:
        return [_portion(np.zeros(0, np.int64), tensor.bits()) for _ in runs]
    found = tensor.runs([(run.start, run.stop) for run in runs], checked=is_partly_read)
    record = tensor.record
    index, values = tensor.section(record.index, checked=True), tensor.section(record.values, checked=True)
    portions = []
    for run, (rank, positions) in zip(runs, found, strict=True):
        positions += run.shift
        bits = partial(tensor.bits_from, rank, positions.size)
        portions.append(Portion(positions, bits, partial(_sections_of, record, index, values, rank, positions)))
    return portions


def _sections_of(
    record: Record, index: Bytes, values: Bytes, rank: int, positions: Positions, numel: int
) -> tuple[bytes | None, bytes | None]:
    """The sections of consecutive nonzeros, given the tensor's, in a weight with `numel` elements."""
    codec = VALUE_CODECS.by_id[record.value_codec]
    return (
        cut(index, record.nnz, record.numel, rank, positions, numel),
        codec.cut(values, record.element_size, rank, rank + positions.size),
    )


def _moved(positions: Positions, bits: Array, views: Sequence[View]) -> tuple[Positions, Array]:
    """(positions in the last view's weight, bits) of the nonzeros that views show."""
    for view in views:
        chosen, positions = move(positions, view.stored, view.weight)
        bits = bits[chosen]
    return positions, bits


def _gathered(parts: Sequence[tuple[Positions, Array]]) -> Portion:
    """All parts' positions, sorted, and their bits."""
    if not parts:
        return _portion(np.zeros(0, np.int64), np.zeros(0, np.uint8))
    where, some = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    if np.all(where[1:] > where[:-1]):
        return _portion(where, some)
    order = order_of(where)
    return _portion(where[order], some[order])


def _portion(positions: Positions, bits: Array) -> Portion:
    return Portion(positions, lambda: bits)
