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
    rows, columns, most = in_rows.size, in_columns.size, registry.MAX_CLASS_BITS
    row = np.repeat(np.arange(rows), in_rows)
    column = positions - row * columns
    finest = refined(by_number(row, column, in_rows, in_columns, most), row, column)
    tile_rows = max(1, min(registry.MAX_TILE // columns, rows))
    counts = -(-rows // tile_rows) * _COUNT_BITS
    by_columns = finest.table.turned.mergers()
    best: tuple[float, int, int, Positions, Positions, ClassTable] | None = None
    for row_bits, into_rows in finest.table.mergers().items():
        half = finest.table.merged(into_rows).turned
        for column_bits, into_columns in by_columns.items():
            table = half.merged(into_columns).turned
            side = rows * row_bits + columns * column_bits + 8 * table.elements.size
            bits = table.bits + side + counts * min(table.elements.size, _KS)
            if best is None or bits < best[0]:
                best = bits, row_bits, column_bits, into_rows, into_columns, table
    assert best is not None
    bits, row_bits, column_bits, into_rows, into_columns, table = best
    found = Classes(into_rows[finest.rows], into_columns[finest.columns], table)
    if min(row_bits, column_bits) < most:
        found = refined(found, row, column)
    row_class, column_class = (lines.astype(np.uint8) for lines in (found.rows, found.columns))
    grid = Grid(columns, tile_rows, row_class, row_bits, column_class, column_bits, low_bits(*found.table))
    return bits - table.bits + found.table.bits, grid


def low_bits(nonzeros: npt.NDArray[np.number], elements: npt.NDArray[np.number]) -> Small:
    """The best k for gaps of this density, the largest where there are no nonzeros.

    Going from k to k + 1 saves bits while a gap reaches 2^k with a probability above 0.618 (Gallager and van Voorhis,
    1975), which is 2^k < 0.4812 / -ln(1 - density); here that logarithm is taken to second order.
    """
    k = np.full(nonzeros.shape, registry.MAX_RICE_K, np.uint8)
    for bits in reversed(range(registry.MAX_RICE_K)):
        k[nonzeros * (2.0**bits * 2.0) >= (2.0 * elements - nonzeros) * 0.4812] = bits
    return k
