"""One delta by itself: what it is, and where in each tensor its nonzeros lie."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shiradelta.combine.interference import in_model_order
from shiradelta.format.arithmetic import Positions
from shiradelta.format.delta import TensorDelta, matrix_shape
from shiradelta.io.describe import describe
from shiradelta.io.reader import Delta
from shiradelta.util.text import layer_of

#: Parts into which rows and columns are cut for a profile.
_PARTS = 40


@dataclass(frozen=True)
class Axis:
    """How the nonzeros of a matrix are spread over its rows, or over its columns.

    `density` is that of up to 40 parts of equal width, in order; `densest_tenth` the share of all nonzeros that the
    densest tenth of the rows (columns) holds: 0.1 or little more where they are spread evenly.
    """

    density: tuple[float, ...]
    densest_tenth: float


@dataclass(frozen=True)
class Profile:
    """One tensor's change.  `largest` is the largest |value| that is added, None where elements are set."""

    name: str
    shape: tuple[int, ...]
    op: str
    nnz: int
    density: float
    largest: float | None
    rows: Axis
    columns: Axis


@dataclass(frozen=True)
class Adapter:
    """One delta: `about` is what `describe` tells, `profiles` are in the order of the model."""

    label: str
    strength: float
    about: dict[str, Any]
    profiles: tuple[Profile, ...]

    @property
    def ops(self) -> dict[str, int]:
        """Operation -> tensors."""
        found = [profile.op for profile in self.profiles]
        return {op: found.count(op) for op in dict.fromkeys(found)}

    @property
    def largest(self) -> float | None:
        """The largest |value| that is added anywhere."""
        return max((p.largest for p in self.profiles if p.largest is not None), default=None)

    @property
    def numel(self) -> int:
        """Weights of the tensors that it changes."""
        return sum(math.prod(profile.shape) for profile in self.profiles)

    def layers(self) -> dict[str, float]:
        """Layer -> density over its tensors."""
        counts: dict[str, tuple[int, int]] = {}
        for profile in self.profiles:
            nnz, numel = counts.get(layer_of(profile.name), (0, 0))
            counts[layer_of(profile.name)] = nnz + profile.nnz, numel + math.prod(profile.shape)
        return {layer: nnz / max(numel, 1) for layer, (nnz, numel) in counts.items()}

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: `describe`'s data, with the profiles beside."""
        profiles = {profile.name: asdict(profile) for profile in self.profiles}
        return {"label": self.label, "strength": self.strength, **self.about, "profiles": profiles}


def look_at(delta: Delta, label: str, strength: float) -> Adapter:
    """Reads a delta, one tensor in memory at a time."""
    profiles = tuple(_profile(name, delta[name]) for name in in_model_order(delta))
    return Adapter(label, strength, describe(delta), profiles)


def _profile(name: str, tensor: TensorDelta) -> Profile:
    rows, columns = matrix_shape(tensor.shape)
    row, column = np.divmod(tensor.positions(), max(columns, 1))
    largest = float(np.abs(tensor.values()).max(initial=0)) if tensor.op == "add" else None
    return Profile(
        name=name,
        shape=tensor.shape,
        op=tensor.op,
        nnz=tensor.nnz,
        density=tensor.nnz / max(tensor.numel, 1),
        largest=largest,
        rows=_axis(row, rows, columns),
        columns=_axis(column, columns, rows),
    )


def _axis(index: Positions, length: int, across: int) -> Axis:
    counts = np.bincount(index, minlength=length)
    if not counts.any():
        return Axis((), 0.0)
    edges = np.linspace(0, length, min(length, _PARTS) + 1).round().astype(np.int64)
    density = np.add.reduceat(counts, edges[:-1]) / (np.diff(edges) * across)
    tenth = -(-length // 10)
    densest = np.partition(counts, length - tenth)[length - tenth :].sum() / counts.sum()
    return Axis(tuple(float(d) for d in density), float(densest))
