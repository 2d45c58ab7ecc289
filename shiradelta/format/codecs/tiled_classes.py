"""Which matrix and which classes of its rows and columns TILED takes for given positions (FORMAT.md, section 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.tiles import Lines, Small
from shiradelta.format.delta import matrix_shape
from shiradelta.format.entropy import entropy
from shiradelta.util.arrays import WINDOW, ranges

Floats = npt.NDArray[np.float64]

#: Lines start in one class where their numbers of nonzeros are within so much of each other: an eighth of an octave.
_STEPS = 8
#: About how many different k there are, and how many bits a tile takes for its number of nonzeros of each.
_KS, _COUNT_BITS = 12, 9
#: TILED takes longer to decode than other codecs, so by estimate it has to save this share of the bits of one density.
_LEAST_SAVING = 1 / 32


@dataclass(frozen=True)
class Grid(Lines):
    """A tensor seen as a matrix, with classes of rows and columns.

    Attributes:
        k: [2^row_bits, 2^column_bits], low bits of a nonzero in a row and a column of these classes.
    """

    k: Small


def choose(positions: Positions, shape: tuple[int, ...]) -> tuple[Grid, bool] | None:
    """The grid that takes the fewest bits, and whether TILED pays with it; None where a row does not fit in a tile."""
    numel = math.prod(shape)
    found = [_choose(positions, numel, width) for width in widths_of(shape, registry.MAX_TILE)]
    if not found:
        return None
    bits, grid = min(found, key=lambda row: row[0])
    return grid, bits <= (1 - _LEAST_SAVING) * positions.size * entropy(positions.size, numel)


def pays_for_lines(nnz: int, shape: tuple[int, ...]) -> bool:
    """Whether the classes of rows and columns can take fewer bits than the positions; each takes one at least.

    A tensor has any number of rows, so this is asked before something is made for each of them.
    """
    numel = math.prod(shape)
    lines = min((numel // width + width for width in widths_of(shape, registry.MAX_TILE)), default=numel)
    return lines < nnz * entropy(nnz, numel)


def lines_differ(positions: Positions, shape: tuple[int, ...]) -> bool:
    """Whether densities of rows and columns differ by so much that classes of them can pay.

    No classes of rows save more than the density of each row would, nor do those of columns; and each line takes a bit.
    """
    numel, nnz = math.prod(shape), positions.size
    least, alike = _LEAST_SAVING * nnz * entropy(nnz, numel), _bits(nnz, numel)
    for columns in widths_of(shape, registry.MAX_TILE):
        in_rows, in_columns = _in_lines(positions, numel, columns)
        of_rows, of_columns = np.full(in_rows.size, columns), np.full(columns, in_rows.size)
        saved = 2 * alike - bits_of(in_rows, of_rows).sum() - bits_of(in_columns, of_columns).sum()
        if saved >= least + in_rows.size + columns:
            return True
    return False


def _in_lines(positions: Positions, numel: int, columns: int) -> tuple[Positions, Positions]:
    """How many positions each row and each column has."""
    # Positions increase: this is faster than dividing each of them.
    edges = np.searchsorted(positions, np.arange(0, numel + 1, columns))
    in_rows, in_columns = np.diff(edges), np.zeros(columns, np.int64)
    step = max(1, in_rows.size * max(WINDOW, columns) // max(positions.size, 1))
    for first, last in ranges(in_rows.size, step):
        starts = np.repeat(np.arange(first, last) * columns, in_rows[first:last])
        in_columns += np.bincount(positions[edges[first] : edges[last]] - starts, minlength=columns)
    return in_rows, in_columns


def widths_of(shape: tuple[int, ...], largest: int) -> list[int]:
    """Elements of a row, of the matrices that are tried: a row has to fit in a tile, of `largest` elements at most."""
    widths = {matrix_shape(shape)[1], shape[-1] if shape else 1}
    return sorted(width for width in widths if width <= largest)


def _choose(positions: Positions, numel: int, columns: int) -> tuple[float, Grid]:
    """(about how many bits it takes, the best grid of so many columns)."""
    rows, most = numel // columns, registry.MAX_CLASS_BITS
    in_rows, in_columns = _in_lines(positions, numel, columns)
    row = np.repeat(np.arange(rows), in_rows)
    column = positions - row * columns
    of_rows, of_columns = nested_classes(in_rows, columns, most), nested_classes(in_columns, rows, most)
    cell = (of_rows[most][row].astype(np.int64) << most) + of_columns[most][column]
    finest = np.bincount(cell, minlength=1 << 2 * most).reshape(1 << most, 1 << most)
    tile_rows = max(1, min(registry.MAX_TILE // columns, rows))
    counts = -(-rows // tile_rows) * _COUNT_BITS
    best: tuple[float, int, int, Positions, Positions] | None = None
    row_counts, column_counts = (
        [np.bincount(classes[bits], minlength=1 << bits) for bits in range(most + 1)]
        for classes in (of_rows, of_columns)
    )
    merged_rows, merged_columns = merging(of_rows), merging(of_columns)
    for row_bits in range(1, most + 1):
        of_row_class = merged_rows[row_bits] @ finest
        for column_bits in range(1, most + 1):
            nonzeros = of_row_class @ merged_columns[column_bits].T
            elements = np.outer(row_counts[row_bits], column_counts[column_bits])
            side = rows * row_bits + columns * column_bits + 8 * nonzeros.size + counts * min(nonzeros.size, _KS)
            bits = float(bits_of(nonzeros, elements).sum()) + side
            if best is None or bits < best[0]:
                best = bits, row_bits, column_bits, nonzeros, elements
    assert best is not None
    bits, row_bits, column_bits, *cells = best
    grid = Grid(columns, tile_rows, of_rows[row_bits], row_bits, of_columns[column_bits], column_bits, low_bits(*cells))
    return bits, grid


def nested_classes(nonzeros: Positions, elements: float | Floats, most: int) -> dict[int, Small]:
    """For each number of bits from 0 to `most`, the class of each line; classes merge into those of fewer bits.

    Two neighbours in order of density become one where that costs the fewest bits, until few enough are left.

    Args:
        nonzeros: of each line.
        elements: of each line.
        most: bits of the finest classes.
    """
    among = np.maximum(np.full(nonzeros.size, elements, np.float64), nonzeros)
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


def merging(classes: dict[int, Small]) -> dict[int, Positions]:
    """For each number of bits, [classes of so many bits, finest classes]: 1 where the one holds the other."""
    finest = max(classes)
    result = {}
    for bits, of_lines in classes.items():
        holds = np.zeros((1 << bits, 1 << finest), np.int64)
        holds[of_lines, classes[finest]] = 1
        result[bits] = holds
    return result


def low_bits(nonzeros: Positions, elements: Positions) -> Small:
    """The best k for gaps of this density, the largest where there are no nonzeros.

    Going from k to k + 1 saves bits while a gap reaches 2^k with a probability above 0.618 (Gallager and van Voorhis,
    1975), which is 2^k < 0.4812 / -ln(1 - density); here that logarithm is taken to second order.
    """
    k = np.full(nonzeros.shape, registry.MAX_RICE_K, np.uint8)
    for bits in reversed(range(registry.MAX_RICE_K)):
        k[nonzeros * (2.0**bits * 2.0) >= (2.0 * elements - nonzeros) * 0.4812] = bits
    return k


def bits_of(nonzeros: npt.NDArray[np.number], elements: npt.NDArray[np.number]) -> Floats:
    """Bits of independent nonzeros: elements x H(density), elementwise."""
    others = elements - nonzeros
    bits = elements * _log2(elements) - nonzeros * _log2(nonzeros) - others * _log2(others)
    return np.asarray(bits, np.float64)


def _bits(nonzeros: float, elements: float) -> float:
    """`bits_of` two numbers."""
    others = elements - nonzeros
    return sum(
        sign * count * math.log2(count) for sign, count in ((1, elements), (-1, nonzeros), (-1, others)) if count > 1
    )


def _log2(counts: npt.NDArray[np.number]) -> Floats:
    """0 for 0."""
    return np.asarray(np.log2(np.maximum(counts, 1)), np.float64)
