"""Many tensors that are read with their base only, decoded and encoded anew in one set of launches.

The host looks at heads, sizes of tiles and counts, of all tensors in one go; the device does the rest.  Where anything
is wrong, or unusual, nothing is made: the slow way then says what it is.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs import BITS
from shiradelta.format.codecs.base import Bytes
from shiradelta.hotswap.bits_there import sent
from shiradelta.hotswap.heads import ClassedSections, TiledSections
from shiradelta.hotswap.pool import Pool
from shiradelta.hotswap.resident import Resident, SectionPart
from shiradelta.hotswap.rice_there import encode_there
from shiradelta.hotswap.shifts_there import ShiftsThere
from shiradelta.hotswap.triton.buckets import Buckets, ones_of_groups
from shiradelta.hotswap.triton.classed import BLOCK
from shiradelta.hotswap.triton.counted import Counted, Tiles
from shiradelta.hotswap.triton.listed import ListedThere
from shiradelta.hotswap.triton.rice import TritonRice
from shiradelta.util.arrays import exclusive, within

Tensor = torch.Tensor


class TensorOnBase(NamedTuple):
    """A tensor whose positions only its base tells.

    Attributes:
        nnz: nonzeros, at least one.
        numel: elements.
        base: all of them, flat, as torch's integers.
        positions: the section of FROM_BASE.
        positions_at: where it is in the device's buffer, a multiple of 4.
        shifts: the section of ULP_FROM_BASE; None if values need no base.
        shifts_at: where it is in the buffer.
    """

    nnz: int
    numel: int
    base: Tensor
    positions: Bytes
    positions_at: int
    shifts: Bytes | None
    shifts_at: int


def resident_batch(tensors: Sequence[TensorOnBase], buffer: Tensor) -> list[Resident] | None:
    """The sections of some tensors as the device keeps them; values are left empty that need no base.

    Args:
        tensors: with elements of one size.
        buffer: uint8 on their device, their sections.
    """
    heads = SectionHeads.of(tensors)
    if heads is None:
        return None
    # Counting takes long on the device, and what waits for it after that has little to wait for.
    sizes = _tile_sizes(tensors, heads.positions)
    counted = Counted(_tiles(tensors, heads.positions, sizes, buffer))
    listed = ListedThere.of(heads.positions, buffer, np.array([tensor.positions_at for tensor in tensors]))
    if listed is None:
        return None
    chosen = [tensor for tensor in tensors if tensor.shifts is not None]
    known, shifts = heads.shifts, None
    stored = known and ShiftsThere.of(known, buffer, np.array([tensor.shifts_at for tensor in chosen]))
    programs = np.add.reduceat(-(-sizes // BLOCK), exclusive(heads.positions.tiles))
    positions, at, *good = nonzeros(tensors, programs, counted, listed)
    if known is not None and stored is not None:
        if len(chosen) < len(tensors):
            parts = zip(tensors, at.split([tensor.nnz for tensor in tensors]), strict=True)
            at = torch.cat([part for tensor, part in parts if tensor.shifts is not None])
        shifts, sound = stored.decode(in_classes(known, at), at.dtype)
        good.append(sound)
    if not torch.stack(good).all():  # what is not sound could be written anywhere
        return None
    counts, numels = [tensor.nnz for tensor in tensors], [tensor.numel for tensor in tensors]
    room = [0 if tensor.shifts is None else BITS.size(tensor.nnz, at.element_size()) for tensor in tensors]
    rice = encode_there(positions, counts, numels, room, TritonRice)
    if shifts is not None:
        taken = [at.element_size() * tensor.nnz for tensor in chosen]
        rooms = [one for one, size in zip(rice, room, strict=True) if size]
        for one, part in zip(rooms, shifts.view(torch.uint8).split(taken), strict=True):
            one.whole[one.room : one.room + part.numel()] = part
    return [
        Resident(
            SectionPart(one.whole, one.start, one.stop),
            SectionPart(one.whole, one.room, one.room + size),
            one.k,
            one.unary_bits,
        )
        for one, size in zip(rice, room, strict=True)
    ]


class SectionHeads(NamedTuple):
    """What the host knows of the sections."""

    positions: TiledSections
    shifts: ClassedSections | None

    @classmethod
    def of(cls, tensors: Sequence[TensorOnBase]) -> SectionHeads | None:
        """Takes the heads of all sections apart; None where one is wrong or unusual."""
        every = [tensor.positions for tensor in tensors]
        numels = np.array([tensor.numel for tensor in tensors])
        positions = TiledSections.of(*Pool.of(every), _sizes(every), numels)
        chosen = [(tensor.shifts, tensor.nnz) for tensor in tensors if tensor.shifts is not None]
        if positions is None or not chosen:
            return None if positions is None else cls(positions, None)
        some = [section for section, _ in chosen]
        counts = np.array([nnz for _, nnz in chosen])
        shifts = ClassedSections.of(*Pool.of(some), _sizes(some), counts)
        return None if shifts is None else cls(positions, shifts)


def _sizes(sections: Sequence[Bytes]) -> Positions:
    return np.array([section.size for section in sections], np.int64)


def nonzeros(
    tensors: Sequence[TensorOnBase], programs: Positions, counted: Counted, listed: ListedThere
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions, elements there, of one tensor after the other; whether lists are sound, and whether counts are).

    `programs` says how many blocks of elements each tensor has.
    """
    cells, ranks, sound = listed.ranks(counted.sizes)
    total = sum(tensor.nnz for tensor in tensors)
    wide = max(tensor.numel for tensor in tensors) > 1 << 31
    positions, at, ends = counted.collect(*counted.nonzeros(cells, ranks), total, wide)
    right = np.cumsum([tensor.nnz for tensor in tensors])
    both = sent(np.stack((np.cumsum(programs) - 1, right)), ends.device)
    return positions, at, sound, (ends[both[0]] == both[1]).all()


def _tile_sizes(tensors: Sequence[TensorOnBase], heads: TiledSections) -> Positions:
    """Elements of each tile."""
    numel, size = (
        np.repeat(each, heads.tiles) for each in ([t.numel for t in tensors], heads.tile_rows * heads.columns)
    )
    return np.minimum(numel - within(heads.tiles) * size, size)


def _tiles(tensors: Sequence[TensorOnBase], heads: TiledSections, sizes: Positions, buffer: Tensor) -> Tiles:
    """The table of all tiles."""
    device, size = buffer.device, tensors[0].base.element_size()
    has_lines = bool(np.any(heads.row_bits + heads.column_bits))
    cells_at, groups_at = exclusive(heads.cell_counts), exclusive(heads.groups)
    buckets = Buckets.of(heads.thresholds, device)
    cells, turned, starts = (sent(each, device) for each in (heads.cells, heads.turned.view(np.uint8), cells_at))
    both = buckets.below, buckets.above
    if not has_lines:  # the cells are those of classes of elements
        both = cells[starts[:, None] + buckets.below], cells[starts[:, None] + buckets.above]
    packed = buckets.packed(*both)
    kept = [packed, cells, turned, buffer, *(one.base for one in tensors)]
    tensor, tile = np.repeat(np.arange(len(tensors)), heads.tiles), within(heads.tiles)
    whole = heads.tile_rows * heads.columns
    sections = np.array([one.positions_at for one in tensors]) + buffer.data_ptr()
    of_tensors = {
        "groups": heads.groups,
        "buckets": _addresses(packed),
        "cells": cells.data_ptr() + cells_at,
        "class_count": heads.classes,
        "column_classes": 1 << heads.column_bits,
        "columns": heads.columns,
        "row_fields": sections + heads.row_at,
        "row_width": heads.row_bits,
        "column_fields": sections + heads.column_at,
        "column_width": heads.column_bits,
        "turned": turned.data_ptr() + groups_at,
    }
    if not (has_lines or buckets.has_cuts):
        kept.append(ones_of_groups(packed & 0xFF, int(heads.groups.max())))
        of_tensors["ones"] = _addresses(kept[-1])
    columns = {name: values[tensor] for name, values in of_tensors.items()}
    addresses = np.array([one.base.data_ptr() for one in tensors])
    columns["base"] = addresses[tensor] + tile * whole[tensor] * size
    columns["size"] = sizes
    columns["position"] = tile * whole[tensor]
    columns["row"] = tile * heads.tile_rows[tensor]
    kind = {"has_lines": has_lines, "has_turned": bool(heads.turned.any())}
    return Tiles.of(columns, size, buckets.shift, kept, **kind)


def _addresses(rows: Tensor) -> Positions:
    """Where each row is."""
    return rows.data_ptr() + np.arange(rows.shape[0]) * (rows.stride(0) * rows.element_size())


def in_classes(heads: ClassedSections, at: Tensor) -> Counted:
    """The base's elements there, of one tensor after the other."""
    device, size = at.device, at.element_size()
    buckets = Buckets.of(heads.thresholds, device)
    packed = buckets.packed(buckets.below, buckets.above)
    tensor, block = np.repeat(np.arange(heads.blocks.size), heads.blocks), within(heads.blocks)
    columns = {
        "base": at.data_ptr() + (exclusive(heads.counts)[tensor] + block * registry.ULP_BLOCK) * size,
        "size": np.minimum(heads.counts[tensor] - block * registry.ULP_BLOCK, registry.ULP_BLOCK),
        "groups": heads.classes[tensor],
        "buckets": _addresses(packed)[tensor],
    }
    kept = [packed, at]
    if not buckets.has_cuts:
        kept.append(ones_of_groups(packed & 0xFF, int(heads.classes.max())))
        columns["ones"] = _addresses(kept[-1])[tensor]
    return Counted(Tiles.of(columns, size, buckets.shift, kept))
