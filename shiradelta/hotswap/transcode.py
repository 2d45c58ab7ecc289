"""Takes deltas apart whose tensors a model holds in another form than its checkpoint: one delta for each weight.

A tensor of the checkpoint may be several weights in memory, or have its elements in another order there.  When its
delta is loaded, it is encoded anew in the memory order of each weight, so that switches know one form only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from typing import NamedTuple

import numpy as np

from shiradelta.errors import BaseMismatchError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import F32, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.float import Float
from shiradelta.format.delta import TensorDelta
from shiradelta.hotswap.protocol import Fit
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.live import Target
from shiradelta.util.arrays import RepeatedPositionError, join_sorted

#: A weight and an operation's name.
Change = tuple[Target, str]


class _Piece(NamedTuple):
    """The nonzeros of a stored tensor's delta that lie in one weight, in the order of the weight.

    Attributes:
        weight: the weight.
        ranks: their numbers among all nonzeros of the delta.
        stored: their positions in the stored tensor.
        positions: their positions in the weight, increasing.
    """

    weight: Target
    ranks: Positions
    stored: Positions
    positions: Positions


def take_apart(
    label: str,
    fits: Iterable[Fit],
    others: Mapping[Target, tuple[StoredTensor, str]],
    backend: str,
    buffer: Callable[[int], Bytes],
) -> tuple[Bytes, list[Fit]]:
    """Encodes deltas of tensors that are in parts anew, one for each weight that has elements of them.

    Args:
        label: the file, for messages.
        fits: the deltas.
        others: all deltas of the file.
        backend: the backend that decodes the result.
        buffer: allocates the memory for the result.

    Returns:
        (a file in memory, its deltas).

    Raises:
        BaseMismatchError: an element would be changed twice.
    """
    fits = list(fits)
    # Groups of values in other codecs do not survive new neighbours.
    codecs = {VALUE_CODECS.by_id[tensor.record.value_codec] for tensor, _, _ in fits if tensor.nnz}
    kept = next(iter(codecs), F32) if len(codecs) == 1 else F32
    codec = kept if isinstance(kept, Float) else F32
    writer = DeltaWriter(BytesIO(), codec.option, False, backend)
    weights: dict[str, tuple[Target, str]] = {}
    missing = Counter((weight, tensor.op) for tensor, target, _ in fits for weight, _ in target.parts)
    waiting: dict[Change, list[tuple[Positions, Array]]] = {}
    for tensor, target, dtype in fits:
        payload = tensor.values() if tensor.operation.adds else tensor.bits()
        for piece in _pieces(tensor, target):
            change = piece.weight, tensor.op
            if piece.weight in others:
                other = others[piece.weight][0].record.name
                raise _changed_twice(label, tensor, piece.weight, f"as tensor {other!r} does")
            waiting.setdefault(change, []).append((piece.positions, payload[piece.ranks]))
            missing[change] -= 1
            if missing[change]:
                continue
            try:
                positions, values = join_sorted(waiting.pop(change))
            except RepeatedPositionError:
                raise _changed_twice(label, tensor, piece.weight, "at a position that another tensor changes") from None
            name = str(len(weights))
            writer.add(name, TensorDelta(piece.weight.shape, positions, values, dtype, tensor.op))
            weights[name] = piece.weight, dtype
    output = BytesIO()
    writer.finish(output)
    data = buffer(output.tell())
    data[:] = np.frombuffer(output.getbuffer(), np.uint8)
    return data, [(tensor, *weights[name]) for name, tensor in open_delta(data, backend).items()]


def base_fingerprint(tensor: StoredTensor, target: Target, base: Mapping[Change, tuple[Positions, Array]]) -> int:
    """The fingerprint of a tensor that is in parts, at a delta's positions (FORMAT.md, 6.3).

    Args:
        tensor: the delta.
        target: the tensor.
        base: the positions that the file changes in each weight, and the base's elements there.
    """
    total = 0
    for piece in _pieces(tensor, target):
        positions, bits = base[piece.weight, tensor.op]
        total += arithmetic.fingerprint(piece.stored, bits[np.searchsorted(positions, piece.positions)])
    return total % (1 << 64)


def _pieces(tensor: StoredTensor, target: Target) -> Iterator[_Piece]:
    """The nonzeros in each of the target's parts."""
    positions = tensor.positions()
    for weight, view in target.parts:
        first, last = np.searchsorted(positions, view.stored.span)
        ranks, where = view.to_weight(positions[first:last])
        ranks += first
        yield _Piece(weight, ranks, positions[ranks], where)


def _changed_twice(label: str, tensor: StoredTensor, weight: Target, how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"{label}: tensor {tensor.record.name!r} changes the model's weight {weight.name!r}, {how}; leave one of the"
        " two out with HotSwap(model, names=...)"
    )
