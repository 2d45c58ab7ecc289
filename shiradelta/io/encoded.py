"""One tensor of a delta as what a file has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shiradelta.backends.protocols import Backend
from shiradelta.errors import DeltaError
from shiradelta.format import arithmetic, registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import BITS, ULP
from shiradelta.format.codecs.base import ValueCodec
from shiradelta.format.codecs.smallest import smallest_section
from shiradelta.format.delta import TensorDelta
from shiradelta.format.digest import tensor_digest
from shiradelta.format.record import Record, Section, combination_problem
from shiradelta.format.windows import windows_of

#: Called with positions, the bits of the base's elements there, and those of the result at strength 1.
SeesResult = Callable[[Positions, Array, Array], None]


@dataclass(frozen=True)
class Encoded:
    """A tensor that is ready to be written.

    Attributes:
        record: its row of the table, but for the sections.
        digest: of what it does.
        index: the positions' section; empty where there are none.
        values: the values' section.
    """

    record: Record
    digest: bytes
    index: bytes
    values: bytes


def encoded(
    name: str, tensor: TensorDelta, codec: ValueCodec, backend: Backend, see: SeesResult | None = None
) -> tuple[Encoded, TensorDelta]:
    """Chooses the codecs of a tensor, and encodes it.

    Args:
        name: its name.
        tensor: the delta.
        codec: how added values are stored; others are stored exactly.
        backend: whose codecs encode.
        see: called with the elements that it changes, if the base's are known.

    Returns:
        (what a file has of it, the tensor as a reader will see it, with quantised values).

    Raises:
        DeltaError: values that do not fit the codec, or a tensor that a reader would refuse.
    """
    operation = tensor.operation
    index_id, value_id = registry.IndexId.NONE.value, registry.ValueId.NONE.value
    index, values, stored = b"", b"", tensor
    if tensor.nnz:
        positions = None  # all of them, which the codec ALL says in no bytes
        index_id = registry.IndexId.ALL.value
        if not tensor.all_positions:
            positions = tensor.positions()
            index_id, index = smallest_section(positions, tensor.shape, backend.index_codecs, tensor.draw)
        value_id = codec.id if operation.adds else (ULP if operation.shifts else BITS).id
        values, decoded = _values(tensor, backend.value_codecs[value_id])
        stored = TensorDelta.trusted(
            shape=tensor.shape,
            positions=positions,
            values=decoded,
            dtype=tensor.dtype,
            op=tensor.op,
            base_bits=tensor.base_bits,
        )
    base_fingerprint, result_fingerprint = _fingerprints(tensor, stored, backend, see)
    nothing = Section(0, 0, 0, 0)
    record = Record(
        name=name,
        shape=tensor.shape,
        dtype=registry.DTYPE_OF_NAME[tensor.dtype],
        operation=operation,
        index_codec=index_id,
        value_codec=value_id,
        nnz=tensor.nnz,
        base_fingerprint=base_fingerprint,
        result_fingerprint=result_fingerprint,
        index=nothing,
        values=nothing,
    )
    problem = combination_problem(record)
    if problem:
        raise DeltaError(problem)
    return Encoded(record, tensor_digest(stored), index, values), stored


def _values(tensor: TensorDelta, codec: ValueCodec) -> tuple[bytes, Array]:
    """(the VALUES section, the values as a reader will decode them)."""
    if not tensor.operation.adds:
        bits = tensor.bits()
        return codec.encode(bits), bits
    section = codec.encode(tensor.values())
    size = registry.DTYPE_OF_NAME[tensor.dtype].size
    return section, codec.decode(np.frombuffer(section, np.uint8), tensor.nnz, size, 0, tensor.nnz)


def _fingerprints(
    tensor: TensorDelta, stored: TensorDelta, backend: Backend, see: SeesResult | None
) -> tuple[int | None, int | None]:
    """Fingerprints of the base and of the result at strength 1; None if the base is unknown."""
    if tensor.dtype == "unspecified":
        return None, None
    base, operation = tensor.base_bits, tensor.operation
    if not operation.in_result or (base is None and not operation.stores_elements):
        # Where the values stay as they are, so does the result.
        same = tensor.result_fingerprint is not None and np.array_equal(stored.bits(), tensor.bits())
        return tensor.base_fingerprint, tensor.result_fingerprint if same else None
    of_base = of_result = start = 0
    for positions, bits in windows_of(stored):
        old = None if base is None else base[start : start + positions.size]
        start += positions.size
        if old is not None:
            of_base += backend.fingerprint(positions, old)
            bits = arithmetic.result(operation, bits, old, tensor.dtype, 1)
            if see is not None:
                see(positions, old, bits)
        of_result += backend.fingerprint(positions, bits)
    known = tensor.base_fingerprint if base is None else of_base % (1 << 64)
    return (known if operation.in_base else None), of_result % (1 << 64)
