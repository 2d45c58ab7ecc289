"""Which classes FROM_BASE takes for given positions and the base's elements (FORMAT.md, section 8)."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base_classes import KEYS, Keys, round_step, thresholds
from shiradelta.format.codecs.line_classes import Floats, bits_of
from shiradelta.format.codecs.tiled_classes import low_bits, widths_of
from shiradelta.format.codecs.tiles import Lines, Small

#: Lines start in one class where their densities are within so much of each other: an eighth of an octave.
_STEPS = 8
#: The most bits of a class of a row or a column that are tried: what more would save, their tables take.
_LINE_BITS = 2
#: Classes of lines are tried where there are fewer of these than so many times the nonzeros.
_LINES = 32
#: Bits of a class more: its thresholds, and a tile's count of what it lists.
_CLASS_COST = 16 + 10
#: Elements that are looked at in one go; they stay in a core's cache.
_WINDOW = 1 << 16


@dataclass(frozen=True)
class BaseGrid(Lines):
    """A tensor seen as a matrix, with classes of rows, columns and the base's elements; 0 bits are for one class.

    Attributes:
        thresholds: uint16, not decreasing, one less than there are classes of elements; the class of an element is how
            many of them are at most its key.
        groups: uint8 [2^row_bits, 2^column_bits, classes of elements]: k, and `registry.TURNED` where what is listed is
            the elements that are no nonzeros.
    """

    thresholds: Keys
    groups: Small

    @cached_property
    def numbers(self) -> Small:
        """The different bytes of `groups`, increasing; a group is an index of them."""
        return np.unique(self.groups)

    @property
    def class_of(self) -> Small:
        """uint8 [keys]: the class of elements of a key."""
        return _classes_of(self.thresholds)

    @cached_property
    def group_of(self) -> Small:
        """uint8 [row classes, column classes, keys]: the group of elements of a key."""
        found: Small = np.searchsorted(self.numbers, self.groups).astype(np.uint8)[:, :, self.class_of]
        return found

    def groups_of(self, tile: int, base: Array) -> Small:
        """The group of each of the elements from a tile on, given their bits."""
        first = tile * self.tile_rows
        keys = keys_of(base).reshape(-1, self.columns)
        if self.row_bits == self.column_bits == 0:
            found: Small = self.group_of[0, 0][keys]
        else:
            rows = self.row_class[first : first + keys.shape[0], None]
            found = self.group_of[rows, self.column_class, keys]
        return found.reshape(-1)


def keys_of(bits: Array) -> Keys:
    """The 15 bits below the sign of floating-point numbers, 7 of those of one byte: they grow with the magnitude."""
    width = 8 * bits.itemsize
    shifted = bits >> np.array(max(width - 16, 0), bits.dtype)
    keys: Keys = (shifted & np.array((1 << min(width - 1, 15)) - 1, bits.dtype)).astype(np.uint16)
    return keys


class BaseCounts:
    """What is counted over all of the base's elements; a backend that is faster gives the same numbers.

    Elements are bits, flat; classes of elements are made by thresholds, as in `BaseGrid`.
    """

    def of_keys(self, base: Array) -> Positions:
        """int64 [keys]: elements of each key."""
        counts: Positions = np.bincount(keys_of(base), minlength=KEYS)
        return counts

    def of_lines(self, base: Array, columns: int, thresholds: Keys) -> tuple[Positions, Positions]:
        """int64 ([rows, classes], [columns, classes]): elements of each class in each row and in each column."""
        rows, count = base.size // columns, thresholds.size + 1
        of_rows, of_columns = np.empty((rows, count), np.int64), np.zeros(columns * count, np.int64)
        for start, some in _windows(base, columns, thresholds):
            row = np.arange(some.shape[0])[:, None] * count
            found = np.bincount((row + some).reshape(-1), minlength=some.shape[0] * count)
            of_rows[start : start + some.shape[0]] = found.reshape(-1, count)
            of_columns += np.bincount((np.arange(columns) * count + some).reshape(-1), minlength=of_columns.size)
        return of_rows, of_columns.reshape(columns, count)

    def joint(self, base: Array, thresholds: Keys, lines: tuple[Small, Small], bits: int) -> Positions:
        """int64 [2^bits, 2^bits, classes]: elements of each class of row, column and element.

        Args:
            base: the elements.
            thresholds: of their classes.
            lines: the class of each row, and of each column.
            bits: of these classes.
        """
        of_rows, of_columns = lines
        shape = (1 << bits, 1 << bits, thresholds.size + 1)
        result = np.zeros(math.prod(shape), np.int64)
        columns = of_columns.astype(np.int64) * shape[2]
        for start, some in _windows(base, of_columns.size, thresholds):
            rows = of_rows[start : start + some.shape[0], None].astype(np.int64) * (shape[1] * shape[2])
            result += np.bincount((rows + columns + some).reshape(-1), minlength=result.size)
        return result.reshape(shape)


def _windows(base: Array, columns: int, thresholds: Keys) -> Iterator[tuple[int, Small]]:
    """(the first of some rows, the class of each of their elements)."""
    classes = _classes_of(thresholds)
    step = max(_WINDOW // columns, 1)
    for start in range(0, base.size // columns, step):
        yield start, classes[keys_of(base[start * columns : (start + step) * columns])].reshape(-1, columns)


def _classes_of(thresholds: Keys) -> Small:
    """The class of each key."""
    return np.searchsorted(thresholds, np.arange(KEYS, dtype=np.uint16), side="right").astype(np.uint8)


def choose(positions: Positions, shape: tuple[int, ...], base: Array, counts: BaseCounts) -> BaseGrid | None:
    """The grid that takes about the fewest bits; None where a row does not fit in a tile.

    Args:
        positions: increasing.
        shape: the tensor's.
        base: all elements' bits, flat.
        counts: what counts them.
    """
    widths = widths_of(shape, registry.MAX_BASE_TILE)
    if not widths:
        return None
    columns, rows = widths[0], base.size // widths[0]
    keys = keys_of(base[positions])
    nonzeros, elements = np.bincount(keys, minlength=KEYS), counts.of_keys(base)
    tile_rows = max(1, min(registry.MAX_BASE_TILE // columns, rows))
    edges = np.union1d(np.arange(0, KEYS, round_step(base.itemsize)), _splits(nonzeros, elements)).astype(np.int64)
    binned, listed = (np.add.reduceat(each, edges) for each in (elements, nonzeros))
    cuts = thresholds(edges, binned, listed, base.itemsize, -(-rows // tile_rows), turns=True)
    classes = _classes_of(cuts)
    row, column = np.divmod(positions, columns)
    count = cuts.size + 1
    most = _LINE_BITS if rows + columns < _LINES * positions.size else 0
    rates = np.bincount(classes, nonzeros, count) / np.maximum(np.bincount(classes, elements, count), 1)
    expected = [(each * rates).sum(1) for each in counts.of_lines(base, columns, cuts)]
    of_rows, of_columns = (
        _nested_classes(np.bincount(lines, minlength=each.size), each * (base.size / positions.size), most)
        for lines, each in zip((row, column), expected, strict=True)
    )
    at = ((of_rows[most][row].astype(np.int64) << most) + of_columns[most][column]) * count
    shape_ = (1 << most, 1 << most, count)
    listed = np.bincount(at + classes[keys], minlength=math.prod(shape_)).reshape(shape_)
    all_ = counts.joint(base, cuts, (of_rows[most], of_columns[most]), most)
    best: tuple[float, int, int, Positions, Positions] | None = None
    merged_rows, merged_columns = _merging(of_rows), _merging(of_columns)
    for row_bits in range(most + 1):
        for column_bits in range(most + 1):
            merged = [
                merged_columns[column_bits] @ np.tensordot(merged_rows[row_bits], cells, axes=1)
                for cells in (listed, all_)
            ]
            side = sum(map(_class_bits, (of_rows[row_bits], of_columns[column_bits]))) + 8 * merged[0].size
            bits = float(bits_of(*merged).sum()) + side
            if best is None or bits < best[0]:
                best = bits, row_bits, column_bits, merged[0], merged[1]
    assert best is not None
    _, row_bits, column_bits, found, sizes = best
    return BaseGrid(
        columns,
        tile_rows,
        of_rows[row_bits],
        row_bits,
        of_columns[column_bits],
        column_bits,
        cuts,
        _groups(found, sizes),
    )


def _nested_classes(nonzeros: Positions, elements: Floats, most: int) -> dict[int, Small]:
    """For each number of bits from 0 to `most`, the class of each line; classes merge into those of fewer bits.

    Two neighbours in order of density become one where that costs the fewest bits, until few enough are left.

    Args:
        nonzeros: of each line.
        elements: of each line.
        most: bits of the finest classes.
    """
    among = np.maximum(elements, nonzeros)
    density = (nonzeros + 1) / np.maximum(among / among.mean(), 2.0**-_STEPS)
    _, group = np.unique(np.floor(np.log2(density) * _STEPS), return_inverse=True)
    found, sizes = (np.bincount(group, weights=each).tolist() for each in (nonzeros, among))
    apart = list(map(_bits, found, sizes))

    def loss(first: int) -> float:
        together = _bits(found[first] + found[first + 1], sizes[first] + sizes[first + 1])
        return together - apart[first] - apart[first + 1]

    starts, losses = list(range(len(found))), [loss(first) for first in range(len(found) - 1)]
    result: dict[int, Small] = {}
    for bits in range(most, -1, -1):
        while len(found) > 1 << bits:
            merged = losses.index(min(losses))
            for each in found, sizes:
                each[merged] += each.pop(merged + 1)
            apart[merged : merged + 2] = [_bits(found[merged], sizes[merged])]
            del starts[merged + 1], losses[merged]
            for first in range(max(merged - 1, 0), min(merged + 1, len(losses))):
                losses[first] = loss(first)
        result[bits] = (np.searchsorted(starts, group, side="right") - 1).astype(np.uint8)
    return result


def _merging(classes: dict[int, Small]) -> dict[int, Positions]:
    """For each number of bits, [classes of so many bits, finest classes]: 1 where the one holds the other."""
    finest = max(classes)
    result = {}
    for bits, of_lines in classes.items():
        holds = np.zeros((1 << bits, 1 << finest), np.int64)
        holds[of_lines, classes[finest]] = 1
        result[bits] = holds
    return result


def _bits(nonzeros: float, elements: float) -> float:
    """`bits_of` two numbers."""
    others = elements - nonzeros
    return sum(
        sign * count * math.log2(count) for sign, count in ((1, elements), (-1, nonzeros), (-1, others)) if count > 1
    )


def _splits(nonzeros: Positions, elements: Positions) -> Keys:
    """Where classes of elements begin but for the first: they are split where that saves the most, while it pays.

    Args:
        nonzeros: of each key.
        elements: of each key.
    """
    used = np.flatnonzero(elements)
    found, sizes = (np.append(0, np.cumsum(counts[used])) for counts in (nonzeros, elements))
    gain, edges = np.zeros(used.size), [0, used.size]

    def weigh(start: int, stop: int) -> None:
        """What a split of one class at each of its keys saves."""
        at = np.arange(start, stop)
        left, right, whole = (
            bits_of(found[stops] - found[starts], sizes[stops] - sizes[starts])
            for starts, stops in ((start, at), (at, stop), (start, stop))
        )
        gain[start:stop] = whole - left - right

    weigh(0, used.size)
    while len(edges) <= registry.MAX_BASE_CLASSES:
        split = int(np.argmax(gain))
        if gain[split] < _CLASS_COST:
            break
        after = bisect(edges, split)
        weigh(edges[after - 1], split)
        weigh(split, edges[after])
        edges.insert(after, split)
    return used[edges[1:-1]].astype(np.uint16)


def _class_bits(of_lines: Small) -> float:
    """Bits of the classes of lines in a packed file, by their entropy."""
    _, counts = np.unique(of_lines, return_counts=True)
    return float(counts @ np.log2(of_lines.size / counts))


def _groups(nonzeros: Positions, elements: Positions) -> Small:
    """The byte of each cell: where most elements are nonzeros, the others are listed."""
    turned = 2 * nonzeros > elements
    found = np.where(turned, elements - nonzeros, nonzeros)
    return low_bits(found, elements) | np.where(turned, registry.TURNED, 0).astype(np.uint8)
