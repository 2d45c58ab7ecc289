"""Tensors that are read with their base only, decoded and encoded anew on the device that has the base.

Positions become RICE and shifts BITS, as kernels read them, without a detour through the host.  What tells that they
are right is the sections' checksums, and the base's fingerprint, which whoever keeps the result compares.
"""

from __future__ import annotations

import numpy as np
import torch

from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs import BITS, ULP_FROM_BASE, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.format.registry import IndexId
from shiradelta.hotswap.from_base import ElementsThere, TorchFromBase
from shiradelta.hotswap.heads import ClassedSections
from shiradelta.hotswap.pool import Pool
from shiradelta.hotswap.resident import Resident, SectionPart, stored
from shiradelta.hotswap.rice_there import encode_there
from shiradelta.hotswap.shifts_there import ShiftsThere, SortedClasses
from shiradelta.io.reader import StoredTensor
from shiradelta.io.restored import codecs_on_base, named, positions_on

Tensor = torch.Tensor


def resident_on_base(
    source: Bytes, tensor: StoredTensor, base: Tensor, codec: TorchFromBase, values_codec: TorchDecoder
) -> Resident:
    """The sections of a tensor as the device keeps them.

    Args:
        source: the file.
        tensor: the tensor.
        base: all elements' bits, flat, in the integers of `bits_dtype`.
        codec: decodes positions there.
        values_codec: that of the values on the device.

    Raises:
        FormatError: a section is damaged, or was made for another base.
        LimitError: the tensor takes too much memory.
    """
    record = tensor.record
    with named(tensor, record.index):
        positions = positions_of(tensor, base, codec)
    with named(tensor, record.values):
        if record.value_codec == ULP_FROM_BASE.id:
            values = SectionPart.there(bits_section(shifts_of(tensor, base[positions])))
        else:
            values = checked_values(source, tensor, values_codec)
    if record.index_codec == IndexId.RICE:
        return Resident.of(stored(source, record.index), values)
    (rice,) = encode_there(positions, [record.nnz], [record.numel], [0])
    return Resident(SectionPart(rice.whole, rice.start, rice.stop), values, rice.k, rice.unary_bits)


def bits_section(values: Tensor) -> Tensor:
    """uint8: a section of the value codec BITS with these elements."""
    size = values.element_size()
    section = torch.zeros(BITS.size(values.numel(), size), dtype=torch.uint8, device=values.device)
    section[: values.numel() * size] = values.view(torch.uint8)
    return section


def positions_of(tensor: StoredTensor, base: Tensor, codec: TorchFromBase) -> Tensor:
    """Those of all nonzeros, on the device of the base."""
    elements = ElementsThere(codec, base)
    found = positions_on(tensor, elements, elements.positions)
    return found if isinstance(found, Tensor) else torch.from_numpy(found).to(base.device)


def checked_values(source: Bytes, tensor: StoredTensor, codec: TorchDecoder) -> SectionPart:
    """Those that need no base, in a codec that the device decodes: in the file, or new bytes."""
    record = tensor.record
    own, data = VALUE_CODECS.by_id[record.value_codec], tensor.section(record.values)
    own.check(data, record.nnz, record.element_size)
    if own.id == codec.id:
        return stored(source, record.values)
    return SectionPart.of(codec.encode(own.decode(data, record.nnz, record.element_size, 0, record.nnz)))


def shifts_of(tensor: StoredTensor, at: Tensor) -> Tensor:
    """Those of all nonzeros, given the base's elements there."""
    record = tensor.record
    data, nnz, size = tensor.section(record.values), record.nnz, record.element_size
    pool, starts = Pool.of([data])
    sections = ClassedSections.of(pool, starts, np.array([data.size]), np.array([nnz]))
    if sections is not None:
        there = torch.from_numpy(data.copy()).to(at.device)
        found = ShiftsThere.of(sections, there, np.zeros(1, np.int64))
        shifts, sound = found.decode(SortedClasses(sections, at), at.dtype)
        if sound:
            return shifts
    # It says what is wrong, and reads shifts of more bits than are read there.
    elements: Array = at.cpu().numpy()
    bits = codecs_on_base()[1].decode_on(data, nnz, size, elements.view(f"<u{size}"))
    return torch.from_numpy(bits.view(f"<i{size}" if size > 1 else np.uint8).copy()).to(at.device)
