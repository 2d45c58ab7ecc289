"""What the tiles and blocks of many sections list, read on the device that has the sections, in torch operations.

Everything is checked there, too: where `sound` is false, something is wrong, and numbers may be anything.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from shiradelta.format.arithmetic import Positions
from shiradelta.hotswap.bits_there import fields_at, owners, sent
from shiradelta.hotswap.heads import ClassedSections, TiledSections
from shiradelta.hotswap.pool import words_of
from shiradelta.util.arrays import exclusive

Tensor = torch.Tensor


class _Numbered(NamedTuple):
    """Tiles or blocks of tensors, and their cells: a cell is a group, or a class, of one of them.

    Attributes:
        tensor: the tensor of each tile.
        tile: each tile's number in its tensor.
        first_cell: of each tile.
        last_cell: of each tile.
        cell_tensor: of each cell.
        cell_group: of each cell, its number in the tile.
        cell_tile: of each cell, its tile's number among all.
    """

    tensor: Tensor
    tile: Tensor
    first_cell: Tensor
    last_cell: Tensor
    cell_tensor: Tensor
    cell_group: Tensor
    cell_tile: Tensor

    @classmethod
    def of(cls, tiles: Positions, groups: Positions, device: torch.device) -> _Numbered:
        """Numbers all of them, given how many tiles each tensor has, and how many groups each of these has."""
        firsts = sent(np.stack((exclusive(tiles), exclusive(tiles * groups), groups)), device)
        tensor, cell_tensor = owners(tiles, device), owners(tiles * groups, device)
        first_tile, first_cell, count = firsts[:, tensor]
        tile = torch.arange(tensor.numel(), device=device) - first_tile
        first_cell = first_cell + tile * count
        cell_first_tile, tensor_cell, cell_count = firsts[:, cell_tensor]
        within = torch.arange(cell_tensor.numel(), device=device) - tensor_cell
        cell_tile = cell_first_tile + within // cell_count
        return cls(tensor, tile, first_cell, first_cell + count - 1, cell_tensor, within % cell_count, cell_tile)


class TileLists(NamedTuple):
    """What tiles of sections of FROM_BASE list.  A cell is a group of a tile; all numbers are int64.

    Attributes:
        begins: [tiles], the first unary bit, among those of all sections in whole words.
        bits: [tiles], unary bits.
        firsts: [tiles], the number of the first listed element among all.
        counts: [tiles], listed elements.
        tile: [cells].
        cell_firsts: [cells].
        cell_counts: [cells].
        ks: [cells].
        lows: [cells], the first bit of low fields, in the buffer.
        sound: bool, a tensor.
    """

    begins: Tensor
    bits: Tensor
    firsts: Tensor
    counts: Tensor
    tile: Tensor
    cell_firsts: Tensor
    cell_counts: Tensor
    ks: Tensor
    lows: Tensor
    sound: Tensor

    @classmethod
    def of(cls, heads: TiledSections, buffer: Tensor, sections: Positions) -> TileLists:
        """Those of sections that start there in a buffer, uint8 on a device."""
        device, groups, tiles = buffer.device, heads.groups, heads.tiles
        parts_at = 8 * (np.repeat(sections, 1 + groups) + heads.part_at)
        parts, ks = sent(np.stack((parts_at, heads.part_width)), device), sent(heads.ks, device)
        edges = np.stack((exclusive(tiles), np.cumsum(tiles) - 1))
        cell_edges = np.stack((exclusive(tiles * groups), np.cumsum(tiles * groups) - 1))
        at = 8 * np.stack((sections + heads.low_at, sections + heads.unary_at, exclusive(words_of(heads.unary_total))))
        small = sent(np.concatenate((edges, cell_edges, at, [heads.unary_total])), device)
        first, last, first_cell, last_cell, low_at, unary_at, words, unary_total = small
        first_part, first_group = sent(np.stack((exclusive(1 + groups), exclusive(groups))), device)
        each = _Numbered.of(tiles, groups, device)
        where, width = parts[:, first_part[each.tensor]]
        bits = fields_at(buffer, where + each.tile * width, width)
        before = bits.cumsum(0) - bits
        good = [(before[last] + bits[last] - before[first] == unary_total).all()]
        begins = before - (before[first] - words)[each.tensor]
        where, width = parts[:, first_part[each.cell_tensor] + 1 + each.cell_group]
        counts = fields_at(buffer, where + each.tile[each.cell_tile] * width, width)
        k = ks[first_group[each.cell_tensor] + each.cell_group]
        ends, low = counts.cumsum(0), counts * k
        firsts, low_before = ends - counts, low.cumsum(0) - low
        lows = low_before - (low_before[first_cell] - low_at)[each.cell_tensor]
        low_end = lows[last_cell] + low[last_cell]
        filled = -low_end & 31
        good.append(((low_end + filled == unary_at) & (fields_at(buffer, low_end, filled) == 0)).all())
        tile_firsts = firsts[each.first_cell]
        tile_counts = ends[each.last_cell] - tile_firsts
        good.append(((tile_counts > 0) | (bits == 0)).all())
        sound = torch.stack(good).all()
        return cls(begins, bits, tile_firsts, tile_counts, each.cell_tile, firsts, counts, k, lows, sound)


class BlockLists(NamedTuple):
    """What blocks of sections of ULP_FROM_BASE list.  A cell is a class of a block; all numbers are int64.

    Attributes:
        begins: [blocks], the first bit of each block's stream, among those of all streams in whole words.
        ends: [blocks], the bit behind it.
        firsts: [blocks], the number of the first listed shift among all.
        counts: [blocks], listed shifts.
        low: [blocks], bits of the low parts of gaps.
        block: [cells].
        cell_firsts: [cells].
        cell_counts: [cells].
        ks: [cells].
        js: [cells].
        lows: [cells], the first bit of low parts, among those of the block.
        sound: bool, a tensor.
    """

    begins: Tensor
    ends: Tensor
    firsts: Tensor
    counts: Tensor
    low: Tensor
    block: Tensor
    cell_firsts: Tensor
    cell_counts: Tensor
    ks: Tensor
    js: Tensor
    lows: Tensor
    sound: Tensor

    @classmethod
    def of(cls, heads: ClassedSections, buffer: Tensor, sections: Positions) -> BlockLists:
        """Those of sections that start there in a buffer, uint8 on a device."""
        device, blocks, classes = buffer.device, heads.blocks, heads.classes
        at = 8 * np.stack((sections + heads.directory_at, exclusive(heads.stream_size)))
        more = np.stack((exclusive(blocks), blocks - 1, heads.bits, exclusive(classes), heads.list_width))
        directory, streams, first, last, stream_bits, first_class, width = sent(np.concatenate((at, more)), device)
        lists_at = 8 * (np.repeat(sections, classes) + heads.list_at)
        lists, ks, js = sent(np.stack((lists_at, heads.ks, heads.js)), device)
        each = _Numbered.of(blocks, classes, device)
        begins = fields_at(buffer, directory[each.tensor] + 32 * each.tile, 32)
        ends = torch.where(each.tile == last[each.tensor], stream_bits[each.tensor], begins.roll(-1))
        number = first_class[each.cell_tensor] + each.cell_group
        own_width = width[each.cell_tensor]
        counts = fields_at(buffer, lists[number] + each.tile[each.cell_tile] * own_width, own_width)
        k, j = ks[number], js[number]
        stops, low = counts.cumsum(0), counts * k
        firsts, low_stops = stops - counts, low.cumsum(0)
        low_before = low_stops - low
        block_firsts, block_low = firsts[each.first_cell], low_before[each.first_cell]
        block_counts = stops[each.last_cell] - block_firsts
        sound = (begins <= ends).all() & (begins[first] == 0).all() & ((block_counts > 0) | (begins == ends)).all()
        shift = streams[each.tensor]
        return cls(
            begins + shift,
            ends + shift,
            block_firsts,
            block_counts,
            low_stops[each.last_cell] - block_low,
            each.cell_tile,
            firsts,
            counts,
            k,
            j,
            low_before - block_low[each.cell_tile],
            sound,
        )
