"""Reads and checks files' tensors, in several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.hotswap.fits import Fits

#: The fewest bytes that a thread reads and checks.
_FEW = 1 << 20


class ShareOfFiles(NamedTuple):
    """A thread's part of files.

    Attributes:
        read: reads it, where it has not been read.
        check: checks the tensors in it, as `StoredTensor.check` does, when it has been read.  A tensor that is in
            several is checked by the last of them.
    """

    read: Callable[[], None]
    check: Callable[[], None]


def pieces_of(files: Sequence[Fits], most: int) -> list[ShareOfFiles]:
    """At most `most` pieces of about as much work each, of the tensors that need no base.

    What takes the interpreter is done before, so threads that work on them wait for nobody.

    Raises:
        LimitError: the decompressed sections of a tensor take more than the limit.
    """
    every: list[list[ShareOfFiles]] = [[] for _ in range(most)]
    for one in files:
        table, numbers = one.delta.table, one.columns.numbers[~one.columns.needs_base]
        for number in numbers[table.zstd[numbers]].tolist():
            one.delta[table.names[number]].check_memory(table[number].unpacked_size)
        for pieces, piece in zip(every, _pieces(one, numbers, most), strict=False):
            pieces.append(piece)
    return [ShareOfFiles(*map(_all, zip(*pieces, strict=True))) for pieces in every if pieces]


def _pieces(one: Fits, numbers: NDArray[np.int64], most: int) -> Iterator[ShareOfFiles]:
    """Those of one file: each thread reads as many bytes, whatever tensors they are of."""
    rows = one.delta.table.rows[numbers]
    starts = rows["index_at"].astype(np.int64)
    ends = registry.align((rows["values_at"] + rows["values_stored"]).astype(np.int64), registry.SECTION_ALIGNMENT)
    sizes = ends - starts
    passed = np.cumsum(sizes)  # bytes up to and with each tensor
    total = int(passed[-1]) if passed.size else 0
    edges = np.linspace(0, total, min(most, max(total // _FEW, 1)) + 1).astype(np.int64)
    first = np.clip(np.searchsorted(edges, passed - sizes, "right") - 1, 0, edges.size - 2)
    last = np.maximum(np.searchsorted(edges, passed, "left") - 1, first)
    check = one.delta.decoder.check_of
    shared = {
        i: _Shared(check(numbers[i : i + 1]), int(last[i] - first[i])) for i in np.flatnonzero(first < last).tolist()
    }
    for piece, (edge, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        here = np.flatnonzero((first <= piece) & (piece <= last))
        low = np.maximum(edge - (passed - sizes)[here], 0) + starts[here]
        high = np.minimum(stop - (passed - sizes)[here], sizes[here]) + starts[here]
        spans = list(zip(low.tolist(), high.tolist(), strict=True))
        checks: list[Callable[[], None]] = [shared[i] for i in here.tolist() if i in shared]
        checks.append(check(numbers[here[first[here] == last[here]]]))
        yield ShareOfFiles(one.unread.filling(spans) if one.unread is not None else _all([]), _all(checks))


class _Shared:
    """The check of a tensor that several pieces have parts of: the last of them does it."""

    def __init__(self, check: Callable[[], None], others: int) -> None:
        self._check, self._others, self._before = check, others, count()

    def __call__(self) -> None:
        if next(self._before) == self._others:
            self._check()


def _all(works: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def do() -> None:
        for work in works:
            work()

    return do
