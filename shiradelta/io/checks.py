"""Checks of many tensors, in few calls and in shares for several threads."""

from __future__ import annotations

from collections.abc import Iterable

from shiradelta.backends.protocols import Decoder
from shiradelta.format.record import Record
from shiradelta.io.reader import StoredTensor


def check_all(tensors: Iterable[StoredTensor]) -> None:
    """`StoredTensor.check` of several tensors, in as few calls as their decoders need."""
    groups: dict[int, tuple[Decoder, list[Record]]] = {}
    for tensor in tensors:
        decoder = tensor.decoder
        groups.setdefault(id(decoder), (decoder, []))[1].append(tensor.record)
    for decoder, records in groups.values():
        decoder.check_many(records)


def shares_of(tensors: Iterable[StoredTensor], count: int) -> list[list[StoredTensor]]:
    """Tensors in at most `count` shares, of about as many nonzeros each."""
    ordered = sorted(tensors, key=lambda tensor: tensor.record.nnz, reverse=True)
    return [ordered[number::count] for number in range(min(count, len(ordered)))]
