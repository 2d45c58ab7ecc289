"""ULP_FROM_BASE in torch operations, on the device that has the base's elements (FORMAT.md, 5.2).

Several tensors are decoded at once, one after the other, and all checks are made on the device: what is wrong is not
told, only that something is.  A reader that has to say more decodes again, by `UlpFromBase`.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from typing import Protocol

import torch

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.hotswap.bits_there import bits_of, fields_at, joined, ones_of
from shiradelta.hotswap.from_base import classes_there, keys_of
from shiradelta.hotswap.heads import ClassedSections
from shiradelta.hotswap.lists_there import BlockLists
from shiradelta.hotswap.pool import words_of

Tensor = torch.Tensor
BLOCK = registry.ULP_BLOCK
#: The widest field of a magnitude that is read here; wider ones, of the largest float64 shifts, are the host's.
_MOST_WIDTH = 62


class InClasses(Protocol):
    """The shifts of some blocks by block, then by class, then by rank.

    Attributes:
        sizes: integers [blocks' classes], how many shifts each class of each block has.
    """

    sizes: Tensor

    def placed(self, cells: Tensor, ranks: Tensor, values: Tensor) -> Tensor:
        """Of each shift by rank: the given one where it is listed; otherwise 1.

        Args:
            cells: int32, the class of a block of each listed one, from 0 for all of them.
            ranks: int32, its number in that class of the block; where it is wrong, any of the result may be.
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
        stops = torch.searchsorted(ordered, torch.arange(first, device=at.device, dtype=torch.int32), right=True)
        self.sizes = stops.diff(prepend=stops.new_zeros(1))

    def placed(self, cells: Tensor, ranks: Tensor, values: Tensor) -> Tensor:
        result = torch.ones_like(self._order, dtype=values.dtype)
        number = (self.sizes.cumsum(0) - self.sizes)[cells] + ranks
        result[self._order[number.clamp(max=self._order.numel() - 1)]] = values
        return result


class ShiftsThere:
    """The shifts of some tensors' nonzeros, one tensor after the other; `of` waits for the device, the rest does not.

    Args:
        lists: those of the blocks.
        streams: uint8, all streams in whole words, and slack.
        ones: int64, the bits of them that are set.
        total: how many shifts are listed.
        minus: uint8, of each shift: whether it is negative.
    """

    def __init__(self, lists: BlockLists, streams: Tensor, ones: Tensor, total: int, minus: Tensor) -> None:
        self._lists, self._streams, self._ones, self._total, self._minus = lists, streams, ones, total, minus

    @classmethod
    def of(cls, sections: ClassedSections, buffer: Tensor, starts: Positions) -> ShiftsThere:
        """Those of sections, given their heads, and where each of them starts in a buffer, uint8 on a device."""
        streams_at = starts + sections.stream_at
        streams = joined(buffer, streams_at, streams_at + sections.stream_size)
        streams = torch.cat((streams, streams.new_zeros(registry.SLACK)))
        minus = bits_of(joined(buffer, starts + sections.signs_at, streams_at))
        counts = sections.counts.tolist()
        parts = minus.split((8 * words_of(sections.counts)).tolist())  # they fill up words
        minus = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        lists = BlockLists.of(sections, buffer, starts)
        return cls(lists, streams, ones_of(streams), int(lists.cell_counts.sum()), minus)

    def decode(self, in_classes: InClasses, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(the shifts, signed integers; bool, a tensor: whether the sections fit these elements).

        Args:
            in_classes: of the base's elements there.
            dtype: torch's integers of the elements' size.
        """
        magnitudes, sound = self._magnitudes(in_classes, dtype)
        # 1 and 0 become 1 and -1; integers wrap where they have no sign.
        return magnitudes * (1 - 2 * self._minus.to(dtype)), sound

    def _magnitudes(self, in_classes: InClasses, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of all shifts, and whether all is right."""
        lists, streams, ones, total = self._lists, self._streams, self._ones, self._total
        device, most = streams.device, (1 << (8 * dtype.itemsize - 1)) - 1
        if not total or ones.numel() < 2 * total:  # each has two unary codes
            none = torch.zeros(0, dtype=torch.int32, device=device)
            return in_classes.placed(none, none, none.to(dtype)), lists.sound & (total == 0)
        stops = lists.cell_counts.cumsum(0)
        good, some = [lists.sound], lists.counts > 0
        number = torch.arange(total, device=device)
        cell = torch.searchsorted(stops, number, right=True)
        block = lists.block[cell]
        block_lasts = (lists.firsts + lists.counts - 1).clamp(min=0)

        def unary(begins: Tensor) -> tuple[Tensor, Tensor]:
            """(the zeros before each of the ones of blocks from there on, the bit behind the last of each block)."""
            slots = (torch.searchsorted(ones, begins) - lists.firsts)[block] + number
            found = ones[slots.clamp(max=ones.numel() - 1)]
            good.append(((slots < ones.numel()) & (found < lists.ends[block])).all())
            previous = torch.cat((found.new_full((1,), -1), found[:-1]))
            is_first = number == lists.firsts[block]
            previous = torch.where(is_first, begins[block] - 1, previous)
            return found - previous - 1, found[block_lasts] + 1

        quotients, low_begins = unary(lists.begins)
        zeros, field_begins = unary(low_begins + lists.low)
        widths = zeros + lists.js[cell]
        good.append((widths <= _MOST_WIDTH).all())
        widths = widths.clamp(min=0, max=_MOST_WIDTH)
        ends = widths.cumsum(0)
        before = (ends - widths)[lists.firsts.clamp(max=total - 1)]
        good.append(((field_begins + ends[block_lasts] - before == lists.ends) | ~some).all())
        at = (field_begins - before)[block] + ends - widths
        wide = fields_at(streams, at, widths.clamp(max=31)) | (
            fields_at(streams, at + 31, (widths - 31).clamp(min=0)) << 31
        )
        beyond = wide + (1 << widths) - (1 << lists.js[cell])
        good.append(((beyond >= 0) & (beyond <= most - 2)).all())
        k, first = lists.ks[cell], lists.cell_firsts[cell]
        low = fields_at(streams, (low_begins[block] + lists.lows[cell]) + (number - first) * k, k)
        sums = torch.cat((number.new_zeros(1), ((quotients.clamp(min=0, max=BLOCK) << k) + low + 1).cumsum(0)))
        ranks = sums[1:] - 1 - sums[first]
        good.append((ranks < in_classes.sizes[cell]).all())
        ranks = ranks.clamp(max=BLOCK - 1)
        return in_classes.placed(cell.int(), ranks.int(), (beyond + 2).to(dtype)), torch.stack(good).all()
