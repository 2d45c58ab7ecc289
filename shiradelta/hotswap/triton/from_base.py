"""FROM_BASE with kernels that go through the base's elements, which plain torch operations would sort."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch

from shiradelta.hotswap.from_base import Chunk, GroupTable, InGroups, TorchFromBase
from shiradelta.hotswap.triton.buckets import Buckets, ones_of_groups
from shiradelta.hotswap.triton.counted import Counted, Tiles

Tensor = torch.Tensor


class CountedChunk(InGroups):
    """`InGroups` of one tensor, by counting."""

    def __init__(self, chunk: Chunk, table: GroupTable) -> None:
        base, size = chunk.base, chunk.size
        tiles = np.arange(-(-base.numel() // size))
        buckets = Buckets.of(table.thresholds[None], base.device)
        given = buckets.below, buckets.above
        packed = buckets.packed(*(given if table.has_lines else (table.cells[each.long()] for each in given)))
        ones = packed if table.has_lines or buckets.has_cuts else ones_of_groups(packed & 0xFF, table.turned.numel())
        kept = base, packed, ones, table.cells, table.turned.byte(), chunk.rows, chunk.columns
        base_, buckets_, ones_, cells_, turned_, rows_, columns_ = (each.data_ptr() for each in kept)
        columns = {
            "base": base_ + tiles * size * base.element_size(),
            "size": np.minimum(base.numel() - tiles * size, size),
            "groups": table.turned.numel(),
            "position": tiles * size,
            "buckets": buckets_,
            "cells": cells_,
            "class_count": table.class_count,
            "column_classes": table.column_classes,
            "columns": chunk.columns.numel(),
            "row": tiles * (size // chunk.columns.numel()),
            "row_fields": rows_,
            "row_width": 32,
            "column_fields": columns_,
            "column_width": 32,
            "turned": turned_,
        }
        if ones is not packed:
            columns["ones"] = ones_
        kind = {"has_lines": table.has_lines, "has_turned": True}
        self._counted = Counted(Tiles.of(columns, base.element_size(), buckets.shift, kept, **kind))
        self.sizes = self._counted.sizes

    def nonzeros(self, cells: Tensor, ranks: Tensor) -> Tensor:
        found, counts = self._counted.nonzeros(cells, ranks)
        positions, _, _ = self._counted.collect(found, counts, int(counts.sum()), True)
        return positions


class TritonFromBase(TorchFromBase):
    """Reads the index codec FROM_BASE with kernels, which take a tenth of the memory of plain torch operations."""

    chunk, element_room = 1 << 26, 4

    def in_groups(self, chunk: Chunk, table: GroupTable) -> InGroups:
        return CountedChunk(chunk, table)
