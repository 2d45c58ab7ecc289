"""Checks of files' tensors, in several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shiradelta.io.reader import Delta


def checks_of(tensors: Iterable[tuple[Delta, NDArray[np.int64]]], count: int) -> list[Callable[[], object]]:
    """At most `count` functions that check tensors together, as `StoredTensor.check` does, of about as much work each.

    What takes the interpreter is done before, so threads that call them wait for nobody.

    Args:
        tensors: files, each with numbers in its table.
        count: the most functions.

    Raises:
        LimitError: the decompressed sections of a tensor take more than the limit.
    """
    checks: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    for delta, numbers in tensors:
        for number in numbers[delta.table.zstd[numbers]].tolist():
            delta[delta.table.names[number]].check_memory(delta.table[number].unpacked_size)
        ordered = numbers[np.argsort(-delta.table.nnz[numbers], kind="stable")]
        for number in range(min(count, ordered.size)):
            checks[number].append(delta.decoder.check_of(ordered[number::count]))
    return [some[0] if len(some) == 1 else partial(_call_all, some) for some in checks if some]


def _call_all(checks: Iterable[Callable[[], None]]) -> None:
    for check in checks:
        check()
