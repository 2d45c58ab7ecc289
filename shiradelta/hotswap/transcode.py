"""Takes deltas apart whose tensors a model holds in another form than its checkpoint: one delta for each weight.

A tensor of the checkpoint may be several weights in memory, or have its elements in another order there.  When its
delta is loaded, it is encoded anew in the memory order of each weight, so that switches know one form only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.backends.protocols import Backend
from shiradelta.errors import BaseMismatchError
from shiradelta.format import container, registry
from shiradelta.format.codecs import BITS, F32, ULP, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, ValueCodec
from shiradelta.format.codecs.float import Float
from shiradelta.format.header import crc32
from shiradelta.format.operations import Operation
from shiradelta.format.record import Record, Section
from shiradelta.format.registry import IndexId, ValueId
from shiradelta.hotswap.fits import Fit, FitColumns, Fits, Targets
from shiradelta.hotswap.portions import Portion, joined, portions_of
from shiradelta.hotswap.shares import Share, Shares, share_of
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.models.live import Target
from shiradelta.models.views import View, move
from shiradelta.util.arrays import RepeatedPositionError
from shiradelta.util.threads import map_in_threads

#: A weight and an operation's name.
Change = tuple[Target, str]


class InPieces(NamedTuple):
    """A delta that was encoded anew, as the file has it.

    Attributes:
        record: its row in the file's table.
        target: the tensor, which is in pieces.
        dtype: of the tensor's elements.
    """

    record: Record
    target: Target
    dtype: str


class Transcoded(NamedTuple):
    """Deltas in the order of the weights that have their elements.

    Attributes:
        fits: a file in memory with all its deltas.
        nonzeros: how many there are in each share that this process has of the file's tensors.
    """

    fits: Fits
    nonzeros: Shares[int]


def take_apart(
    label: str,
    fits: Iterable[Fit],
    others: Mapping[Target, tuple[StoredTensor, str]],
    backend: str,
    buffer: Callable[[int], Bytes],
    partly: Container[str],
) -> Transcoded:
    """Encodes deltas of tensors that are in parts anew, one for each weight that has elements of them.

    Args:
        label: the file, for messages.
        fits: the deltas.
        others: all deltas of the file.
        backend: the backend that decodes the result.
        buffer: allocates the memory for the result.
        partly: names of tensors of which only what is needed was read.

    Raises:
        BaseMismatchError: an element would be changed twice.
    """
    fits = list(fits)
    groups = _apart(fits)
    known = choose(backend, (IndexId.RICE,), ())
    made = map_in_threads(lambda group: _encoded(label, group, others, known, partly), groups)
    pieces = [piece for some, _ in made for piece in some]
    nonzeros: dict[str, dict[Share, int]] = {tensor.record.name: {} for tensor, _, _ in fits}
    for _, found in made:
        nonzeros.update(found)
    data = _as_file(pieces, buffer)
    delta, targets = open_delta(data, backend), Targets(piece.weight for piece in pieces)
    columns = FitColumns(delta.table, np.arange(len(delta)), targets, [piece.dtype for piece in pieces])
    return Transcoded(Fits(data, delta, columns), nonzeros)


def _apart(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Groups of deltas that share weights, so that those of different groups can be encoded at a time."""
    group_of: dict[Target, list[Fit]] = {}
    for fit in fits:
        weights = [weight for weight, _ in fit[1].leaves()]
        before = {id(group): group for weight in weights if (group := group_of.get(weight)) is not None}
        joined = max(before.values(), key=len, default=[])
        for group in before.values():
            if group is not joined:
                joined += group
                weights += [weight for _, target, _ in group for weight, _ in target.leaves()]
        joined.append(fit)
        group_of.update(dict.fromkeys(weights, joined))
    return list({id(group): group for group in group_of.values()}.values())


@dataclass(frozen=True)
class _Piece:
    """A weight's delta, encoded.

    Attributes:
        weight: the weight.
        dtype: of its elements.
        operation: what the delta does.
        nnz: how many nonzeros it has.
        value_codec: the id of the codec of its values.
        index: its positions in RICE.
        values: its values.
        checksums: of both.
    """

    weight: Target
    dtype: str
    operation: Operation
    nnz: int
    value_codec: int
    index: bytes
    values: bytes
    checksums: tuple[int, int]

    def record(self, name: str, start: int) -> Record:
        """Its row in the table of a file, where its sections begin at `start`."""
        index = Section(start, len(self.index), len(self.index), self.checksums[0])
        values = Section(index.end, len(self.values), len(self.values), self.checksums[1])
        return Record(
            name=name,
            shape=self.weight.shape,
            dtype=registry.DTYPE_OF_NAME[self.dtype],
            operation=self.operation,
            index_codec=(IndexId.RICE if self.nnz else IndexId.NONE).value,
            value_codec=self.value_codec,
            nnz=self.nnz,
            base_fingerprint=None,
            result_fingerprint=None,
            index=index,
            values=values,
        )


def _encoded(
    label: str,
    fits: Sequence[Fit],
    others: Mapping[Target, tuple[StoredTensor, str]],
    backend: Backend,
    partly: Container[str],
) -> tuple[list[_Piece], dict[str, dict[Share, int]]]:
    """Encodes deltas of tensors that share weights, one for each weight and operation.

    Returns:
        (the weights' deltas, the nonzeros in each share of the tensors).
    """
    nonzeros: dict[str, dict[Share, int]] = {}
    portions: dict[Change, list[Portion]] = {}
    last: dict[Change, tuple[StoredTensor, str]] = {}
    codecs: dict[Change, set[ValueCodec]] = {}
    for tensor, target, dtype in fits:
        leaves = list(target.leaves())
        nonzeros[tensor.record.name] = shares = {}
        portions_here = portions_of(tensor, leaves, tensor.record.name in partly)
        for (weight, views), portion in zip(leaves, portions_here, strict=True):
            if weight in others:
                other = others[weight][0].record.name
                raise _changed_twice(label, tensor, weight, f"as tensor {other!r} does")
            change = weight, tensor.op
            shares[share_of(views)] = portion.positions.size
            portions.setdefault(change, []).append(portion)
            last[change] = tensor, dtype
            if portion.positions.size:
                codecs.setdefault(change, set()).add(VALUE_CODECS.by_id[tensor.record.value_codec])
    pieces = []
    for change, (tensor, dtype) in last.items():
        weight, _ = change
        every = portions.pop(change)
        some = [portion for portion in every if portion.positions.size] or every[:1]
        try:
            portion = some[0] if len(some) == 1 else joined(some)
        except RepeatedPositionError:
            how = "at a position that another tensor changes"
            raise _changed_twice(label, tensor, weight, how) from None
        pieces.append(_piece(weight, tensor, dtype, portion, codecs.get(change, set()), backend))
    return pieces, nonzeros


def _piece(
    weight: Target,
    tensor: StoredTensor,
    dtype: str,
    portion: Portion,
    codecs: set[ValueCodec],
    backend: Backend,
) -> _Piece:
    """Encodes a weight's delta; the tensor is one of those that it comes from, and codecs are those of their values."""
    operation, (positions, bits, sections) = tensor.operation, portion
    if not positions.size:
        return _Piece(weight, dtype, operation, 0, ValueId.NONE.value, b"", b"", (0, 0))
    if operation.adds:
        # Groups of values in other codecs do not survive new neighbours.
        kept = next(iter(codecs)) if len(codecs) == 1 else F32
        id = (kept if isinstance(kept, Float) else F32).id
    else:
        id = (ULP if operation.shifts else BITS).id
    index, values = (None, None) if sections is None else sections(math.prod(weight.shape))
    if index is None:
        index = backend.index_codecs[IndexId.RICE].encode(positions, weight.shape)
    if values is None:
        found = bits()
        values = backend.value_codecs.get(id, VALUE_CODECS.by_id[id]).encode(
            found.view(np.float32) if operation.adds else found
        )
    return _Piece(weight, dtype, operation, positions.size, id, index, values, (crc32(index), crc32(values)))


def _as_file(pieces: Sequence[_Piece], buffer: Callable[[int], Bytes]) -> Bytes:
    """The pieces as a file in memory, in their order; its digest is not computed."""
    names = [f"{number:08}" for number in range(len(pieces))]
    start = container.payload_start(len(names), sum(map(len, names)), {})
    records = []
    for name, piece in zip(names, pieces, strict=True):
        records.append(piece.record(name, start))
        start = records[-1].values.end
    data = buffer(start)
    front = np.frombuffer(container.build(records, {}, bytes(32), start), np.uint8)
    data[: front.size] = front

    def fill(pair: tuple[Record, _Piece]) -> None:
        record, piece = pair
        for section, content in ((record.index, piece.index), (record.values, piece.values)):
            data[section.offset : section.offset + section.stored] = np.frombuffer(content, np.uint8)
            data[section.offset + section.stored : section.end] = 0

    map_in_threads(fill, list(zip(records, pieces, strict=True)))
    return data


def stored_positions(positions: Any, views: Sequence[View]) -> tuple[Any, Any]:
    """Finds the positions of a weight that these views show, each a view of the one before.

    Args:
        positions: int64; a NumPy array or a torch tensor.
        views: the stored tensor's own first.

    Returns:
        (their indices in `positions`, or the slice of all; their positions in the stored tensor, in the same order).
    """
    chosen: Any = slice(None)
    where = positions
    for view in reversed(views):
        some, where = move(where, view.weight, view.stored)
        chosen = some if isinstance(chosen, slice) else chosen[some]
    return chosen, where


def _changed_twice(label: str, tensor: StoredTensor, weight: Target, how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"{label}: tensor {tensor.record.name!r} changes the model's weight {weight.name!r}, {how}; leave one of the"
        " two out with HotSwap(model, names=...)"
    )
