"""Profiles one delta: its contents, and how its nonzeros are spread over each tensor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shiradelta.format.arithmetic import Positions
from shiradelta.format.delta import TensorDelta, matrix_shape
from shiradelta.io.describe import describe
from shiradelta.io.reader import Delta
from shiradelta.models.names import in_model_order, layer_of

#: Number of parts into which a profile divides rows and columns.
_PARTS = 40
#: The most rows or columns that are counted one by one: memory does not grow with the shape.
_LINES = 1 << 20
#: As many are counted where nonzeros are few: time does not grow with the shape, either.
_FEW_LINES = 1 << 12


@dataclass(frozen=True)
class Axis:
    """How the nonzeros of a matrix are spread over its rows, or over its columns.

    Attributes:
        density: the density of up to 40 parts of equal width, in order.
        densest_tenth: share of all nonzeros in the densest tenth of the rows (columns); about 0.1 if they are spread
            evenly.  Of more than 2^20 rows (columns), groups of neighbours are taken; of more than 2^12 already where
            nonzeros are few.
    """

    density: tuple[float, ...]
    densest_tenth: float


@dataclass(frozen=True)
class TensorProfile:
    """The profile of one tensor's change.

    Attributes:
        name: the tensor's name.
        shape: the tensor's shape.
        op: the operation.
        nnz: number of nonzeros.
        density: share of the tensor's elements that are listed.
        largest: the largest |value| that is added; None if elements are set.
        rows: spread of the nonzeros over the rows.
        columns: spread of the nonzeros over the columns.
    """

    name: str
    shape: tuple[int, ...]
    op: str
    nnz: int
    density: float
    largest: float | None
    rows: Axis
    columns: Axis


@dataclass(frozen=True)
class DeltaProfile:
    """The profile of one delta.

    Attributes:
        label: a short name.
        strength: alpha.
        about: the result of `describe`.
        profiles: the tensors' profiles, in the order of the model.
    """

    label: str
    strength: float
    about: dict[str, Any]
    profiles: tuple[TensorProfile, ...]

    @property
    def ops(self) -> dict[str, int]:
        """Operation -> number of tensors."""
        found = [profile.op for profile in self.profiles]
        return {op: found.count(op) for op in dict.fromkeys(found)}

    @property
    def largest(self) -> float | None:
        """The largest |value| that is added to any tensor."""
        return max((p.largest for p in self.profiles if p.largest is not None), default=None)

    @property
    def numel(self) -> int:
        """Number of weights in the tensors that it changes."""
        return sum(math.prod(profile.shape) for profile in self.profiles)

    def layers(self) -> dict[str, float]:
        """Layer -> density over its tensors."""
        counts: dict[str, tuple[int, int]] = {}
        for profile in self.profiles:
            nnz, numel = counts.get(layer_of(profile.name), (0, 0))
            counts[layer_of(profile.name)] = nnz + profile.nnz, numel + math.prod(profile.shape)
        return {layer: nnz / max(numel, 1) for layer, (nnz, numel) in counts.items()}

    def as_dict(self) -> dict[str, Any]:
        """The data of `describe` and the profiles, as JSON shows them."""
        profiles = {profile.name: asdict(profile) for profile in self.profiles}
        return {"label": self.label, "strength": self.strength, **self.about, "profiles": profiles}


def profile(delta: Delta, label: str, strength: float) -> DeltaProfile:
    """Profiles a delta, with one tensor in memory at a time."""
    profiles = tuple(_tensor_profile(name, delta[name]) for name in in_model_order(delta))
    return DeltaProfile(label, strength, describe(delta), profiles)


def _tensor_profile(name: str, tensor: TensorDelta) -> TensorProfile:
    rows, columns = matrix_shape(tensor.shape)
    over_rows, over_columns = _Counts(rows, tensor.nnz), _Counts(columns, tensor.nnz)
    for positions in tensor.position_windows():
        row, column = np.divmod(positions, columns)
        over_rows.add(row)
        over_columns.add(column)
    largest = None
    if tensor.operation.adds:
        largest = float(max((np.abs(bits.view(np.float32)).max() for bits in tensor.bits_windows()), default=0))
    return TensorProfile(
        name=name,
        shape=tensor.shape,
        op=tensor.op,
        nnz=tensor.nnz,
        density=tensor.nnz / max(tensor.numel, 1),
        largest=largest,
        rows=over_rows.axis(columns),
        columns=over_columns.axis(rows),
    )


class _Counts:
    """How many nonzeros each row, or each column, of a matrix has; neighbours are counted together in a large one.

    Args:
        length: the number of rows, or of columns.
        nnz: the number of nonzeros.  With 16 times as many groups, the densest tenth has all of them in any case.
    """

    def __init__(self, length: int, nnz: int) -> None:
        self._length = length
        self._width = max(-(-length // min(_LINES, max(_FEW_LINES, 16 * nnz))), 1)
        self._counts = np.zeros(-(-length // self._width), np.int64)

    def add(self, lines: Positions) -> None:
        """Counts one nonzero in each of these rows, or columns."""
        if lines.size:
            groups = lines // self._width
            first = groups.min()
            counts = np.bincount(groups - first)
            self._counts[first : first + counts.size] += counts

    def axis(self, across: int) -> Axis:
        """The spread over rows, which have `across` elements, or over columns."""
        counts, length = self._counts, self._counts.size
        if not counts.any():
            return Axis((), 0.0)
        edges = np.linspace(0, length, min(length, _PARTS) + 1).round().astype(np.int64)
        widths = np.diff(np.minimum(edges * self._width, self._length))
        density = np.add.reduceat(counts, edges[:-1]) / (widths * across)
        tenth = -(-length // 10)
        densest = np.partition(counts, length - tenth)[length - tenth :].sum() / counts.sum()
        return Axis(tuple(float(d) for d in density), float(densest))
