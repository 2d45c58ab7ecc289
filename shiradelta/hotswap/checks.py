"""Checks of a file's tensors, in several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter

from shiradelta.backends.protocols import Decoder
from shiradelta.format.record import Record
from shiradelta.io.reader import StoredTensor

_NONZEROS = attrgetter("nnz")


def checks_of(tensors: Iterable[StoredTensor], count: int) -> list[Callable[[], object]]:
    """At most `count` functions that do `StoredTensor.check` of all these tensors together, of about as much work each.

    What takes the interpreter is done before, so threads that call them wait for nobody.

    Raises:
        LimitError: the decompressed sections of a tensor take more than the limit.
    """
    checks: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    groups: dict[int, tuple[Decoder, list[Record]]] = {}
    for tensor in tensors:
        decoder = tensor.decoder
        groups.setdefault(id(decoder), (decoder, []))[1].append(tensor.record)
    for decoder, records in groups.values():
        ordered = sorted(records, key=_NONZEROS, reverse=True)
        for number in range(min(count, len(ordered))):
            checks[number].append(decoder.check_of(ordered[number::count]))
    return [some[0] if len(some) == 1 else partial(_call_all, some) for some in checks if some]


def _call_all(checks: Iterable[Callable[[], None]]) -> None:
    for check in checks:
        check()
