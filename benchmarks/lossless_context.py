"""What a changed weight's position costs if the base is known: given its exponent, and rates of rows and columns.

`python -m benchmarks.lossless_context` makes the steps of benchmarks/lossless.py and prints bits a position, of
matrices above 100,000 elements, with every table that a reader would need counted.  No codec does this yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.lossless import LARGE, RATES, STEPS, State, bits, steps
from benchmarks.table import print_table
from shiradelta.format.entropy import entropy

#: Classes of the exponent (the largest, and smaller ones down to this many), and of rows' and columns' rates.
EXPONENTS, CLASSES = 12, 8
#: Bits of a class's rate in a table, and of the class of a row or column.
RATE_BITS, CLASS_BITS = 4, 3
Counts = NDArray[np.float64]


def matrices(base: State, tuned: State) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """(which elements change, the class of their exponent) of each large matrix."""
    for name, tensor in base.items():
        if tensor.dim() == 2 and tensor.numel() > LARGE:
            old, new = (bits(state[name]).reshape(tuple(tensor.shape)) for state in (base, tuned))
            exponent = (old >> 7 & 0xFF).astype(np.int64)
            yield old != new, np.maximum(exponent - int(exponent.max()) + EXPONENTS - 1, 0)


def ideal(changed: Counts, of: Counts) -> float:
    """Bits of the positions, if each class has a rate of its own."""
    return float(sum(n * entropy(int(n), int(size)) for n, size in zip(changed, of, strict=True) if n))


def rice(changed: Counts, of: Counts) -> float:
    """The same with a Rice code, which has the best k for each class, of geometric gaps."""
    total = 0.0
    for n, size in zip(changed, of, strict=True):
        rate = n / max(size, 1)
        total += n * min(k + 1 / -np.expm1(2.0**k * np.log1p(-min(rate, 0.999))) for k in range(24)) if n else 0
    return total


def ranked(rate: Counts) -> NDArray[np.int64]:
    """Classes of equal size, by rate."""
    classes = np.empty(rate.size, np.int64)
    classes[np.argsort(rate, kind="stable")] = np.arange(rate.size) * CLASSES // rate.size
    return classes


def costs(changed: NDArray[np.bool_], exponent: NDArray[np.int64]) -> dict[str, float]:
    """Way -> bits of all positions of a matrix, with its tables."""
    marks = changed.ravel().astype(np.float64)

    def counted(keys: NDArray[np.int64], most: int) -> tuple[Counts, Counts]:
        sizes = np.bincount(keys.ravel(), minlength=most).astype(np.float64)
        return np.bincount(keys.ravel(), marks, most).astype(np.float64), sizes

    by_exponent = counted(exponent, EXPONENTS)
    expected = (by_exponent[0] / np.maximum(by_exponent[1], 1))[exponent]
    rows, columns = (
        ranked(changed.sum(axis) / np.maximum(expected.sum(axis), 1e-9)) for axis in (1, 0)
    )  # how often they change, relative to their exponents
    every = counted((exponent * CLASSES + rows[:, None]) * CLASSES + columns, EXPONENTS * CLASSES**2)
    table, lines = EXPONENTS * RATE_BITS, CLASS_BITS * (rows.size + columns.size)
    return {
        "independent": ideal(marks.sum(keepdims=True), np.array([marks.size], np.float64)),
        "exponent": ideal(*by_exponent) + table,
        "exponent, Rice": rice(*by_exponent) + table,
        "exponent, rows, columns, tables not counted": ideal(*every),
        "exponent, rows, columns": ideal(*every) + lines + CLASSES**2 * table,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps before the one that is measured")
    options = parser.parse_args()
    columns: list[dict[str, float]] = []
    for rate in RATES:
        every = steps(rate)
        base = [next(every) for _ in range(options.steps)][-1]
        columns.append(per_position(base, next(every)))
    rows = [[way, *(f"{column[way]:.2f}" for column in columns)] for way in columns[0]]
    print_table("bits a position, tables counted", [["contexts", *(f"{rate:g}" for rate in RATES)], *rows])


def per_position(base: State, tuned: State) -> dict[str, float]:
    """Way -> bits a position, over all large matrices."""
    total: dict[str, float] = {}
    nonzeros = 0
    for changed, exponent in matrices(base, tuned):
        nonzeros += int(changed.sum())
        for way, cost in costs(changed, exponent).items() if changed.any() else ():
            total[way] = total.get(way, 0.0) + cost
    return {way: cost / nonzeros for way, cost in total.items()}


if __name__ == "__main__":
    main()
