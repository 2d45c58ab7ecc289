"""Compares two deltas: which tensors differ, and at how many elements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shiradelta.format.delta import TensorDelta
from shiradelta.format.windows import Window, side_by_side
from shiradelta.io.reader import Delta
from shiradelta.util import text


@dataclass(frozen=True)
class TensorDifference:
    """How two deltas of one tensor differ.

    Attributes:
        name: the tensor.
        why: what differs, where elements cannot be compared, such as "shape 4x4 and 4x8"; else empty.
        first, second: elements that only the first or only the second delta changes.
        values: elements that both change, to different values.
    """

    name: str
    why: str = ""
    first: int = 0
    second: int = 0
    values: int = 0

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return bool(self.why or self.first or self.second or self.values)


def differences(first: Delta, second: Delta) -> list[TensorDifference]:
    """The tensors that two deltas do not change alike, in the order of their names.  Codecs and metadata do not count.

    Raises:
        FormatError: a file is refused.
        LimitError: a tensor takes more memory than the limit of its file allows.
    """
    found = []
    for name in sorted({*first, *second}):
        if name not in second:
            found.append(TensorDifference(name, "only in the first", first=first[name].nnz))
        elif name not in first:
            found.append(TensorDifference(name, "only in the second", second=second[name].nnz))
        else:
            found.append(_compare(name, first[name], second[name]))
    return [each for each in found if each.differs]


def _compare(name: str, first: TensorDelta, second: TensorDelta) -> TensorDifference:
    for what in ("op", "dtype", "shape"):
        one, other = getattr(first, what), getattr(second, what)
        if one != other:
            said = (text.shape(each) if what == "shape" else each for each in (one, other))
            return TensorDifference(name, f"{what} {' and '.join(said)}", first.nnz, second.nnz)
    if not first.operation.in_result:
        return TensorDifference(name)
    only_first = only_second = values = 0
    for one, other in side_by_side([first, second]):
        counts = _count(one, other)
        only_first, only_second, values = only_first + counts[0], only_second + counts[1], values + counts[2]
    return TensorDifference(name, "", only_first, only_second, values)


def _count(one: Window | None, other: Window | None) -> tuple[int, int, int]:
    """(positions only in one window, only in the other, in both with other bits)."""
    if one is None or other is None:
        return (0 if one is None else one[0].size), (0 if other is None else other[0].size), 0
    common, at, there = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    changed = np.count_nonzero(one[1][at] != other[1][there])
    return one[0].size - common.size, other[0].size - common.size, int(changed)
