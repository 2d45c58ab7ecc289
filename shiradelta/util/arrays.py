"""Array operations that several parts of the package need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: The most nonzeros that are decoded at a time where a whole tensor is not needed: a multiple of a block and a group.
WINDOW = 1 << 17


def ranges(count: int, step: int = WINDOW) -> Iterator[tuple[int, int]]:
    """Cuts 0 to `count` into consecutive (start, stop) of at most `step`."""
    for start in range(0, count, step):
        yield start, min(start + step, count)


def exclusive(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of the counts before each."""
    found: NDArray[np.int64] = np.cumsum(counts) - counts
    return found


def within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ..., its count - 1, of each count."""
    return np.arange(int(counts.sum())) - np.repeat(exclusive(counts), counts)


def different(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.int64]:
    """Where two arrays of one size differ, increasing."""
    # In windows that stay in a core's cache: memory that was not touched before takes longer than the comparison.
    # Their own numbers take half of the result's bytes, and are given up one by one.
    found = [
        (start, np.flatnonzero(one[start:stop] != other[start:stop]).astype(np.uint32))
        for start, stop in ranges(one.size)
    ]
    result = np.empty(sum(own.size for _, own in found), np.int64)
    end = result.size
    while found:
        start, own = found.pop()
        np.add(own, np.int64(start), out=result[end - own.size : end])
        end -= own.size
    return result


def all_different(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays of one size differ everywhere; the first element that does not ends the search."""
    return all(bool((one[start:stop] != other[start:stop]).all()) for start, stop in ranges(one.size))


def aligned(
    positions: Iterator[NDArray[np.int64]], values: Iterator[NDArray[Any]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """(positions, values) of the same numbers, from windows of both that are cut differently; none is empty.

    When the last one is taken, both have ended.
    """
    left: NDArray[Any] | None = None
    for own in positions:
        while left is None or left.size < own.size:
            part = next(values)
            left = part if left is None or not left.size else np.concatenate((left, part))
        if own.size:
            yield own, left[: own.size]
            left = left[own.size :]
    for _ in values:
        pass


class RepeatedPositionError(Exception):
    """Internal: `join_sorted` found a position twice; its caller says what that means.

    Attributes:
        position: the lowest such position.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"position {position} occurs twice")
        self.position = position


class MergedRuns(NamedTuple):
    """Sorted runs of numbers, merged.

    Attributes:
        union: every number once, increasing.
        indices: for each run, where its numbers are in the union.
        first: for each number of all runs, sorted, whether it is the first of equal ones.
    """

    union: NDArray[np.int64]
    indices: list[NDArray[np.int64]]
    first: NDArray[np.bool_]

    def shared(self) -> NDArray[np.bool_]:
        """For each number of the union, whether several runs have it."""
        return np.append(~self.first[1:], False)[self.first]


def merge_sorted(runs: Sequence[NDArray[np.int64]]) -> MergedRuns:
    """Merges increasing runs of integers.

    A stable sort recognises the runs and merges them; `numpy.unique` would sort from scratch.
    """
    everything = np.concatenate(runs)
    order = np.argsort(everything, kind="stable")
    ordered = everything[order]
    first = np.ones(everything.size, np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    indices = np.empty(everything.size, np.int64)
    indices[order] = np.cumsum(first) - 1
    return MergedRuns(ordered[first], np.split(indices, np.cumsum([run.size for run in runs])[:-1]), first)


def order_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stable order of integers that are not negative, sixteen bits at a time.

    Where they are in no order, this takes a tenth of the time of a stable `numpy.argsort`, which only recognises runs.
    """
    order = np.arange(numbers.size)
    largest = int(numbers.max(initial=0))
    for shift in range(0, max(largest.bit_length(), 1), 16):
        digits = (numbers[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digits, kind="stable")]
    return order


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every number once, increasing; fast where the numbers are runs of increasing ones.

    `numpy.unique` puts numbers into a hash table, which takes ten times as long for many distinct ones.
    """
    if np.all(numbers[1:] > numbers[:-1]):
        return numbers
    ordered: NDArray[np.int64] = np.sort(numbers, kind="stable")
    first: NDArray[np.bool_] = np.append(True, ordered[1:] != ordered[:-1])
    return ordered[first]


def join_sorted(runs: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Joins (positions, values) of several runs into one, sorted by position.

    Raises:
        RepeatedPositionError: a position occurs twice.
    """
    if len(runs) == 1 and np.all(runs[0][0][1:] > runs[0][0][:-1]):  # as with most tensors
        return runs[0]
    merged = merge_sorted([positions for positions, _ in runs])
    if not merged.first.all():
        raise RepeatedPositionError(int(merged.union[np.argmax(merged.shared())]))
    indices = np.concatenate(merged.indices)
    values = np.concatenate([values for _, values in runs])
    joined = np.empty_like(values)
    joined[indices] = values
    return merged.union, joined


def overlay_values(xp: Any, values: Any, positions: Any, other_positions: Any, other_values: Any) -> Any:
    """`values` at `positions`, replaced by `other_values` wherever `other_positions` has the same position.

    Args:
        xp: the array library, NumPy or torch.
        values: one per position.
        positions: increasing.
        other_positions: increasing.
        other_values: one per other position.
    """
    if not len(other_positions):
        return values
    slot = xp.searchsorted(other_positions, positions).clip(max=len(other_positions) - 1)
    return xp.where(other_positions[slot] == positions, other_values[slot], values)


def sum_of_squares(values: NDArray[np.float32]) -> float:
    """The sum of squares in float64: finite if all values are, and precise enough to compare close sums."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        wide = values.astype(np.float64)
    return float(wide @ wide)
