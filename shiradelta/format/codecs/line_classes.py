"""Classes of rows and columns: nonzeros of a class of rows are as dense in each class of columns, and the other way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.format.arithmetic import Positions

Floats = npt.NDArray[np.float64]

#: How often rows and columns take turns at most: while a time saves this share of the bits.
_ROUNDS, _WORTH = 2, 1 / 128
#: How often lines of one direction choose their classes before those of the other do.
_TIMES = 2
#: Lines that have fewer nonzeros on the mean keep their classes: counts of each would take more than the positions.
_FEW = 2
#: Bits are counted in whole parts, so that sums do not depend on the order of addition.  A line takes at most a bit an
#: element, so with a class below them its bits fit in float32, where a line has up to 131,072 elements.
_PARTS = 8


class ClassTable(NamedTuple):
    """What classes of rows and of columns have in common.

    Attributes:
        nonzeros: float64 [row classes, column classes], in rows and columns of these classes.
        elements: float64 [row classes, column classes].
    """

    nonzeros: Floats
    elements: Floats

    @property
    def turned(self) -> ClassTable:
        """With rows and columns exchanged."""
        return ClassTable(self.nonzeros.T, self.elements.T)

    @property
    def bits(self) -> float:
        """What positions take, given the classes."""
        return float(bits_of(*self).sum())

    def merged(self, into: Positions) -> ClassTable:
        """Given what classes of rows become."""
        held = _holding(into, int(into.max()) + 1).astype(np.float64)
        return ClassTable(held @ self.nonzeros, held @ self.elements)

    def mergers(self) -> dict[int, Positions]:
        """For each number of bits, what classes of rows become: merged are neighbours in order of density."""
        count, result = self.nonzeros.shape[0], {}
        order = np.argsort(self.nonzeros.sum(1) / np.maximum(self.elements.sum(1), 1), kind="stable")
        found, sizes = (np.concatenate((np.zeros_like(each[:1]), np.cumsum(each[order], axis=0))) for each in self)
        first, last = np.triu_indices(count + 1, 1)
        costs = np.full((count + 1, count + 1), np.inf)  # of a class from one up to another
        costs[first, last] = bits_of(found[last] - found[first], sizes[last] - sizes[first]).sum(axis=1)
        best, cuts = np.append(0, np.full(count, np.inf)), []
        for classes in range(1, count // 2 + 1):
            every = best[:, None] + costs
            best = every.min(axis=0)
            cuts.append(every.argmin(axis=0))
            if classes > 1 and classes & (classes - 1) == 0:
                starts = [count]
                for cut in reversed(cuts):
                    starts.append(int(cut[starts[-1]]))
                into = result[classes.bit_length() - 1] = np.empty(count, np.int64)
                into[order] = np.repeat(np.arange(classes), np.diff(starts[::-1]))
        result[count.bit_length() - 1] = np.arange(count)
        return result


class Classes(NamedTuple):
    """Classes of the rows and of the columns of a matrix.

    Attributes:
        rows: int64 [rows], the class of each.
        columns: int64 [columns].
        table: of these classes.
    """

    rows: Positions
    columns: Positions
    table: ClassTable


def by_number(row: Positions, column: Positions, in_rows: Positions, in_columns: Positions, bits: int) -> Classes:
    """2^bits classes of rows and of columns, by their numbers of nonzeros.

    Args:
        row: int64, of each nonzero.
        column: int64, of each nonzero.
        in_rows: nonzeros of each row.
        in_columns: nonzeros of each column.
        bits: of a class.
    """
    rows, columns = (_steps(each, 1 << bits) for each in (in_rows, in_columns))
    cells = np.bincount((rows << bits)[row] + columns[column], minlength=1 << 2 * bits)
    sizes = np.outer(*(np.bincount(each, minlength=1 << bits) for each in (rows, columns)))
    return Classes(rows, columns, ClassTable(cells.reshape(sizes.shape).astype(np.float64), sizes.astype(np.float64)))


def _steps(nonzeros: Positions, count: int) -> Positions:
    """int64, up to `count` classes of lines by their numbers of nonzeros.

    The steps are even in the square root, as the number of nonzeros of a line is as uncertain as its square root is
    large, but smaller where there are many lines.
    """
    step = np.sqrt(16 * nonzeros).astype(np.int64)
    lines = np.cbrt(np.bincount(step))
    ends = np.cumsum(lines)
    of_step = ((ends - lines / 2) * (count / ends[-1])).astype(np.int64)
    classes: Positions = of_step[step]
    return classes


def refined(classes: Classes, row: Positions, column: Positions) -> Classes:
    """As many classes that take fewer bits: each line goes to the class in which it takes the fewest.

    Rows and columns take turns, given the classes of the others, while that pays.

    Args:
        classes: to begin with.
        row: int64, of each nonzero.
        column: int64, of each nonzero.
    """
    if row.size < _FEW * (classes.rows.size + classes.columns.size):
        return classes
    cells, room = np.empty_like(row), np.empty_like(row)  # used again, since memory that is new takes longer

    def turned(given: Classes, line: Positions, other: Positions) -> Classes:
        """With better classes of rows; rows and columns are exchanged."""
        count = given.table.nonzeros.shape[1]
        np.multiply(line, count, out=cells)
        np.add(cells, np.take(given.columns, other, out=room, mode="clip"), out=cells)
        found = np.bincount(cells, minlength=given.rows.size * count).reshape(-1, count)
        rows, table = _moved(given, found.astype(np.float32))
        return Classes(given.columns, rows, table.turned)

    for _ in range(_ROUNDS):
        before, classes = classes, turned(turned(classes, row, column), column, row)
        if classes.table.bits > (1 - _WORTH) * before.table.bits:
            break
    return classes


def _moved(given: Classes, found: npt.NDArray[np.float32]) -> tuple[Positions, ClassTable]:
    """Better classes of rows, and their table, given the nonzeros of each row in columns of each class."""
    rows, table, (count, others) = given.rows, given.table, given.table.nonzeros.shape
    of_columns = np.bincount(given.columns, minlength=others)
    saved = np.empty((count, rows.size), np.float32)
    for _ in range(_TIMES):
        density = (table.nonzeros + 0.25) / (table.elements + 0.5)
        none = np.log2(1 - density)
        by_nonzero, by_class = (np.rint(bits * _PARTS) * count for bits in (np.log2(density) - none, none @ of_columns))
        np.matmul(by_nonzero.astype(np.float32), found.T, out=saved)
        saved += (by_class + np.arange(count)).astype(np.float32)[:, None]
        rows = saved.max(axis=0).astype(np.int64) & (count - 1)  # argmax takes longer than all else
        sizes = np.outer(np.bincount(rows, minlength=count), of_columns)
        table = ClassTable((_holding(rows, count) @ found).astype(np.float64), sizes.astype(np.float64))
    return rows, table


def _holding(classes: Positions, count: int) -> npt.NDArray[np.float32]:
    """float32 [count, lines]: 1 where the class is that of the line."""
    held: npt.NDArray[np.float32] = (np.arange(count)[:, None] == classes).astype(np.float32)
    return held


def bits_of(nonzeros: npt.NDArray[np.number], elements: npt.NDArray[np.number]) -> Floats:
    """Bits of independent nonzeros: elements x H(density), elementwise."""
    others = elements - nonzeros
    bits = elements * _log2(elements) - nonzeros * _log2(nonzeros) - others * _log2(others)
    return np.asarray(bits, np.float64)


def _log2(counts: npt.NDArray[np.number]) -> Floats:
    """0 for 0."""
    return np.asarray(np.log2(np.maximum(counts, 1)), np.float64)
