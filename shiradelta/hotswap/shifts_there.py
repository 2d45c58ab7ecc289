"""ULP_FROM_BASE in torch operations, on the device that has the base's elements (FORMAT.md, 5.2).

Several tensors are decoded at once, one after the other, and all checks are made on the device: what is wrong is not
told, only that something is.  A reader that has to say more decodes again, by `UlpFromBase`.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.hotswap.bits_there import bits_of, fields_at, ones_of, sent
from shiradelta.hotswap.from_base import classes_there, keys_of
from shiradelta.hotswap.heads import ClassedSections
from shiradelta.hotswap.pool import words_of
from shiradelta.util.arrays import exclusive, within

Tensor = torch.Tensor
BLOCK = registry.ULP_BLOCK
#: The widest field of a magnitude that is read here; wider ones, of the largest float64 shifts, are the host's.
_MOST_WIDTH = 62


class InClasses(Protocol):
    """The shifts of some blocks by block, then by class, then by rank.

    Attributes:
        stops: int64 [blocks' classes], where each class of each block ends in that order.
    """

    stops: Tensor

    def placed(self, cells: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        """Of each shift by rank: the given one where it is listed; otherwise 1.

        Args:
            cells: int32, the class of a block of each listed one, from 0 for all of them.
            numbers: int64, its number in that order, within its class.
            values: those that are given.
        """


class SortedClasses(InClasses):
    """`InClasses` by sorting, in plain torch operations.

    Args:
        sections: of some tensors.
        at: the base's elements there, as torch's integers, one tensor after the other.
    """

    def __init__(self, sections: ClassedSections, at: Tensor) -> None:
        tables = classes_there(sections.thresholds, at.device)
        cells, first = [], 0
        counts, classes = sections.counts.tolist(), sections.classes.tolist()
        for table, some, count in zip(tables, at.split(counts), classes, strict=True):
            block = torch.arange(some.numel(), device=at.device, dtype=torch.int32) // BLOCK
            cells.append(table[keys_of(some)] + (block * count + first))
            first += -(-some.numel() // BLOCK) * count
        ordered, self._order = torch.cat(cells).sort(stable=True)
        self.stops = torch.searchsorted(ordered, torch.arange(first, device=at.device, dtype=torch.int32), right=True)

    def placed(self, cells: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        result = torch.ones_like(self._order, dtype=values.dtype)
        result[self._order[numbers]] = values
        return result


class ShiftsThere(NamedTuple):
    """Shifts on a device.

    Attributes:
        shifts: signed integers of the elements' size, of torch's kinds, one tensor after the other.
        sound: bool, a tensor: whether the sections fit these elements.
    """

    shifts: Tensor
    sound: Tensor


def decode_there(
    sections: ClassedSections, streams: Tensor, signs: Tensor, in_classes: InClasses, like: Tensor
) -> ShiftsThere:
    """The shifts of some tensors' nonzeros.

    Args:
        sections: of these tensors.
        streams: uint8 on the device, all streams, one after the other, and slack behind the last.
        signs: uint8 on the device, all signs.
        in_classes: of the base's elements there.
        like: a tensor of the dtype of the shifts.
    """
    magnitudes, sound = _magnitudes(_Lists.of(sections), streams, in_classes, like.dtype)
    minus = bits_of(signs)
    if sections.counts.size > 1:  # leave out what fills up words
        parts = minus.split((8 * words_of(sections.counts)).tolist())
        minus = torch.cat([part[:count] for part, count in zip(parts, sections.counts.tolist(), strict=True)])
    else:
        minus = minus[: int(sections.counts[0])]
    # 1 and 0 become 1 and -1; integers wrap where they have no sign.
    return ShiftsThere(magnitudes * (1 - 2 * minus.to(like.dtype)), sound)


class _Lists(NamedTuple):
    """What blocks list, all int64 on the host; blocks and classes of blocks that list nothing are left out.

    Attributes:
        begins: the first bit of each block's stream.
        ends: the bit behind it.
        counts: how many shifts each block lists.
        low: bits of the low parts of each block's gaps.
        cells: [5, cells], of each class of a block: its number among all, that of the block, k, j, and how many shifts
            are listed.
        sound: whether no block without a list has bits.
    """

    begins: Positions
    ends: Positions
    counts: Positions
    low: Positions
    cells: Positions
    sound: bool

    @classmethod
    def of(cls, sections: ClassedSections) -> _Lists:
        """Those of several tensors, whose streams follow each other in whole words."""
        tensor = np.repeat(np.arange(sections.blocks.size), sections.blocks)
        classes = sections.classes[tensor]
        block, number = np.repeat(np.arange(tensor.size), classes), within(classes)
        ks, js = (each[exclusive(sections.classes)[tensor[block]] + number] for each in (sections.ks, sections.js))
        firsts = exclusive(classes)
        counts, low = (np.add.reduceat(each, firsts) for each in (sections.listed, sections.listed * ks))
        lists = counts > 0
        at = (8 * exclusive(sections.stream_size))[tensor]
        begins, ends = sections.begins + at, sections.ends + at
        cells = np.stack((np.arange(block.size), (np.cumsum(lists) - 1)[block], ks, js, sections.listed))
        sound = bool(np.all(begins[~lists] == ends[~lists]))
        return cls(begins[lists], ends[lists], counts[lists], low[lists], cells[:, sections.listed > 0], sound)


def _magnitudes(lists: _Lists, streams: Tensor, in_classes: InClasses, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(those of all shifts, in integers of the elements' size; whether all is right)."""
    device, total, most = streams.device, int(lists.counts.sum()), (1 << (8 * dtype.itemsize - 1)) - 1
    good = [sent(np.array(lists.sound), device)]
    if not total:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return in_classes.placed(none.int(), none, none.to(dtype)), good[0]
    _, of_block, ks, _, listed = lists.cells
    # Of each class of a block: its first listed shift, and where its low bits are in those of the block.
    before = exclusive(listed)
    low = exclusive(listed * ks) - exclusive(lists.low)[of_block]
    small = sent(np.concatenate((lists.cells, [before, low])), device)
    blocks = sent(np.stack((lists.begins, lists.ends, lists.counts, lists.low, exclusive(lists.counts))), device)
    of_cell = torch.repeat_interleave(small[4], output_size=total)
    cell, block, k, j, _, first, low_at = small[:, of_cell]
    number = torch.arange(total, device=device)
    within = number - first
    ones = ones_of(streams)

    def unary(begins: Tensor) -> tuple[Tensor, Tensor]:
        """(the zeros before each of the ones of blocks from there on, the bit behind the last one of each block)."""
        slots = torch.searchsorted(ones, begins)[block] + number - blocks[4][block]
        found = ones[slots.clamp(max=max(ones.numel() - 1, 0))] if ones.numel() else torch.zeros_like(slots)
        good.append(((slots < ones.numel()) & (found < blocks[1][block])).all())
        previous = torch.cat((found.new_full((1,), -1), found[:-1]))
        previous[blocks[4]] = begins - 1
        return found - previous - 1, found[blocks[4] + blocks[2] - 1] + 1

    quotients, low_begins = unary(blocks[0])
    zeros, field_begins = unary(low_begins + blocks[3])
    widths = zeros + j
    good.append((widths <= _MOST_WIDTH).all())
    widths = widths.clamp(min=0, max=_MOST_WIDTH)
    stops = widths.cumsum(0)
    before_block = torch.cat((stops.new_zeros(1), stops))[blocks[4]]
    good.append((field_begins + stops[blocks[4] + blocks[2] - 1] - before_block == blocks[1]).all())
    at = field_begins[block] + stops - widths - before_block[block]
    wide = fields_at(streams, at, widths.clamp(max=31)) | (
        fields_at(streams, at + 31, (widths - 31).clamp(min=0)) << 31
    )
    beyond = wide + (1 << widths) - (1 << j)
    good.append(((beyond >= 0) & (beyond <= most - 2)).all())
    gaps = (quotients.clamp(min=0, max=BLOCK) << k) + fields_at(streams, low_begins[block] + low_at + within * k, k)
    sums = torch.cat((gaps.new_zeros(1), (gaps + 1).cumsum(0)))
    order = sums[1:] - 1 - sums[first]
    starts = torch.cat((in_classes.stops.new_zeros(1), in_classes.stops[:-1]))
    placed = starts[cell] + order
    good.append((placed < in_classes.stops[cell]).all())
    placed = torch.minimum(placed, (in_classes.stops[-1:] - 1).clamp(min=0))
    return in_classes.placed(cell.int(), placed, (beyond + 2).to(dtype)), torch.stack(good).all()
