"""Which matrix and which classes of its rows and columns TILED takes for given positions (FORMAT.md, section 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.line_classes import Classes, ClassTable, bits_of, by_number, refined
from shiradelta.format.codecs.tiles import Lines, Small
from shiradelta.format.delta import matrix_shape
from shiradelta.format.entropy import entropy
from shiradelta.util.arrays import WINDOW, ranges

#: About how many different k there are, and how many bits a tile takes for its number of nonzeros of each.
_KS, _COUNT_BITS = 12, 9
#: TILED takes longer to decode than other codecs, so by estimate it has to save this share of the bits of one density.
_LEAST_SAVING = 1 / 32


#: Nonzeros of each row and of each column of a tensor, by the number of columns that it is seen as.
CountsInLines = dict[int, tuple[Positions, Positions]]


@dataclass(frozen=True)
class Grid(Lines):
    """A tensor seen as a matrix, with classes of rows and columns.

    Attributes:
        k: [2^row_bits, 2^column_bits], low bits of a nonzero in a row and a column of these classes.
    """

    k: Small


def choose(
    positions: Positions, shape: tuple[int, ...], counts: CountsInLines | None = None
) -> tuple[Grid, bool] | None:
    """The grid that takes the fewest bits, and whether TILED pays with it; None where a row does not fit in a tile.

    Args:
        positions: increasing.
        shape: the tensor's.
        counts: what `counts_in_lines` says of them, if it has been asked.
    """
    numel = math.prod(shape)
    counts = counts_in_lines(positions, shape) if counts is None else counts
    found = [_choose(positions, *in_lines) for in_lines in counts.values()]
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


def counts_in_lines(positions: Positions, shape: tuple[int, ...]) -> CountsInLines:
    """Counts for each width of a row that TILED may take."""
    numel = math.prod(shape)
    return {width: _in_lines(positions, numel, width) for width in widths_of(shape, registry.MAX_TILE)}


def lines_differ(counts: CountsInLines, nnz: int) -> bool:
    """Whether densities of rows and columns differ by so much that classes of them can pay.

    No classes by density alone save more than the density of each row and of each column would; and each line takes a
    bit.  Classes may save more where rows have their nonzeros in other columns, which is not looked for by itself.
    """
    for columns, (in_rows, in_columns) in counts.items():
        alike = nnz * entropy(nnz, in_rows.size * columns)
        of_rows, of_columns = np.full(in_rows.size, columns), np.full(columns, in_rows.size)
        saved = 2 * alike - bits_of(in_rows, of_rows).sum() - bits_of(in_columns, of_columns).sum()
        if saved >= _LEAST_SAVING * alike + in_rows.size + columns:
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


def _choose(positions: Positions, in_rows: Positions, in_columns: Positions) -> tuple[float, Grid]:
    """(about how many bits it takes, the best grid), given the nonzeros of each row and of each column."""
    columns, most = in_columns.size, registry.MAX_CLASS_BITS
    row = np.repeat(np.arange(in_rows.size), in_rows)
    column = positions - row * columns
    tile_rows = max(1, min(registry.MAX_TILE // columns, in_rows.size))
    tiles = -(-in_rows.size // tile_rows)
    simple = by_number(row, column, in_rows, in_columns, most)
    better = _merged(refined(simple, row, column), tiles)
    if min(better.table.nonzeros.shape) < 1 << most:
        better = refined(better, row, column)
    # Refined classes take fewer bits by their densities, and not always in whole k.
    every = [(_bits(each, each.table, tiles), each) for each in (better, _merged(simple, tiles))]
    bits, found = min(every, key=lambda pair: pair[0])
    row_class, column_class = (lines.astype(np.uint8) for lines in (found.rows, found.columns))
    row_bits, column_bits = _class_bits(found.table)
    grid = Grid(columns, tile_rows, row_class, row_bits, column_class, column_bits, low_bits(*found.table))
    return bits, grid


def _merged(finest: Classes, tiles: int) -> Classes:
    """Those of fewer classes, or as many, that take the fewest bits in so many tiles."""
    by_columns = finest.table.turned.mergers()
    best: tuple[float, Positions, Positions, ClassTable] | None = None
    for into_rows in finest.table.mergers().values():
        half = finest.table.merged(into_rows).turned
        for into_columns in by_columns.values():
            table = half.merged(into_columns).turned
            bits = _bits(finest, table, tiles)
            if best is None or bits < best[0]:
                best = bits, into_rows, into_columns, table
    assert best is not None
    _, into_rows, into_columns, table = best
    return Classes(into_rows[finest.rows], into_columns[finest.columns], table)


def _bits(lines: Classes, table: ClassTable, tiles: int) -> float:
    """About how many a section takes, given its lines, the table of their classes, and how many tiles there are."""
    row_bits, column_bits = _class_bits(table)
    side = lines.rows.size * row_bits + lines.columns.size * column_bits + 8 * table.elements.size
    k = low_bits(*table).astype(np.float64)
    # Of independent gaps, so many reach 2^k, and each time that one does takes a bit.
    density = np.clip(table.nonzeros / np.maximum(table.elements, 1), 1e-12, 1 - 1e-12)
    reach = np.exp(np.log1p(-density) * 2.0**k)
    coded = (table.nonzeros * (k + 1 + reach / (1 - reach))).sum()
    return float(coded) + side + tiles * _COUNT_BITS * min(table.elements.size, _KS)


def _class_bits(table: ClassTable) -> tuple[int, int]:
    """Bits of a class of rows, and of columns."""
    row_classes, column_classes = table.nonzeros.shape
    return row_classes.bit_length() - 1, column_classes.bit_length() - 1


def low_bits(nonzeros: npt.NDArray[np.number], elements: npt.NDArray[np.number]) -> Small:
    """The best k for gaps of this density, the largest where there are no nonzeros.

    Going from k to k + 1 saves bits while a gap reaches 2^k with a probability above 0.618 (Gallager and van Voorhis,
    1975), which is 2^k < 0.4812 / -ln(1 - density); here that logarithm is taken to second order.
    """
    part, power = np.frexp((2.0 * elements - nonzeros) * 0.4812 / np.maximum(nonzeros, 1))
    k = np.clip(power - (part == 0.5) - 1, 0, registry.MAX_RICE_K)
    found = np.where((nonzeros > 0) | (elements == 0), k, registry.MAX_RICE_K)
    return found.astype(np.uint8, order="C")  # a table may be the transpose of another
