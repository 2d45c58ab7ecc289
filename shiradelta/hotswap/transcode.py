"""Takes deltas apart whose tensors a model holds in another form than its checkpoint: one delta for each weight.

A tensor of the checkpoint may be several weights in memory, or have its elements in another order there.  When its
delta is loaded, it is encoded anew in the memory order of each weight, so that switches know one form only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np

from shiradelta.errors import BaseMismatchError
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import F32, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.float import Float
from shiradelta.format.delta import TensorDelta
from shiradelta.format.record import Record
from shiradelta.hotswap.protocol import Fit
from shiradelta.hotswap.shares import Share, Shares, share_of
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.live import Target
from shiradelta.models.views import View
from shiradelta.util.arrays import RepeatedPositionError, join_sorted

#: A weight and an operation's name.
Change = tuple[Target, str]


class _Portion(NamedTuple):
    """The nonzeros of a stored tensor's delta that lie in one weight, in the order of the weight.

    Attributes:
        weight: the weight.
        views: which elements it has.
        ranks: their numbers among all nonzeros of the delta.
        positions: their positions in the weight, increasing.
    """

    weight: Target
    views: tuple[View, ...]
    ranks: Positions
    positions: Positions

    @property
    def share(self) -> Share:
        """Which elements of the stored tensor it has."""
        return share_of(self.views)


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
        data: a file in memory.
        fits: its deltas.
        nonzeros: how many there are in each share that this process has of the file's tensors.
    """

    data: Bytes
    fits: list[Fit]
    nonzeros: Shares[int]


def take_apart(
    label: str,
    fits: Iterable[Fit],
    others: Mapping[Target, tuple[StoredTensor, str]],
    backend: str,
    buffer: Callable[[int], Bytes],
) -> Transcoded:
    """Encodes deltas of tensors that are in parts anew, one for each weight that has elements of them.

    Args:
        label: the file, for messages.
        fits: the deltas.
        others: all deltas of the file.
        backend: the backend that decodes the result.
        buffer: allocates the memory for the result.

    Raises:
        BaseMismatchError: an element would be changed twice.
    """
    fits = list(fits)
    nonzeros: dict[str, dict[Share, int]] = {tensor.record.name: {} for tensor, _, _ in fits}
    # Groups of values in other codecs do not survive new neighbours.
    codecs = {VALUE_CODECS.by_id[tensor.record.value_codec] for tensor, _, _ in fits if tensor.nnz}
    kept = next(iter(codecs), F32) if len(codecs) == 1 else F32
    codec = kept if isinstance(kept, Float) else F32
    writer = DeltaWriter(BytesIO(), codec.option, False, backend)
    weights: dict[str, tuple[Target, str]] = {}
    missing = Counter((weight, tensor.op) for tensor, target, _ in fits for weight, _ in target.leaves())
    waiting: dict[Change, list[tuple[Positions, Array]]] = {}
    for tensor, target, dtype in fits:
        payload = tensor.payload()
        for portion in _portions(tensor, target):
            change = portion.weight, tensor.op
            nonzeros[tensor.record.name][portion.share] = portion.ranks.size
            if portion.weight in others:
                other = others[portion.weight][0].record.name
                raise _changed_twice(label, tensor, portion.weight, f"as tensor {other!r} does")
            waiting.setdefault(change, []).append((portion.positions, payload[portion.ranks]))
            missing[change] -= 1
            if missing[change]:
                continue
            try:
                positions, values = join_sorted(waiting.pop(change))
            except RepeatedPositionError:
                how = "at a position that another tensor changes"
                raise _changed_twice(label, tensor, portion.weight, how) from None
            name = str(len(weights))
            writer.add(name, TensorDelta(portion.weight.shape, positions, values, dtype, tensor.op))
            weights[name] = portion.weight, dtype
    output = BytesIO()
    writer.finish(output)
    data = buffer(output.tell())
    data[:] = np.frombuffer(output.getbuffer(), np.uint8)
    deltas = open_delta(data, backend).items()
    return Transcoded(data, [(tensor, *weights[name]) for name, tensor in deltas], nonzeros)


def _portions(tensor: StoredTensor, target: Target) -> Iterator[_Portion]:
    """The nonzeros in each of the target's pieces of memory."""
    positions = tensor.positions()
    for weight, views in target.leaves():
        ranks, where = np.arange(positions.size), positions
        for view in views:
            first, last = np.searchsorted(where, view.stored.span)
            chosen, where = view.to_weight(where[first:last])
            ranks = ranks[first:last][chosen]
        yield _Portion(weight, views, ranks, where)


def stored_positions(positions: Positions, views: Sequence[View]) -> tuple[Positions, Positions]:
    """Finds the positions of a weight that these views show, each a view of the one before.

    Returns:
        (their indices in `positions`, their positions in the stored tensor).
    """
    chosen, where = np.arange(positions.size), positions
    for view in reversed(views):
        some, where = view.from_weight(where)
        chosen = chosen[some]
    return chosen, where


def _changed_twice(label: str, tensor: StoredTensor, weight: Target, how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"{label}: tensor {tensor.record.name!r} changes the model's weight {weight.name!r}, {how}; leave one of the"
        " two out with HotSwap(model, names=...)"
    )
