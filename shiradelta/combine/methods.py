"""The merge methods: how `fuse` combines several deltas' contributions to one tensor.  One row each.

A method is a function from an `Overlay` to one float32 value per position.  `@merge_method` adds it to `METHODS`, from
which the command line and the messages take their names; docs/extend/merge-method.md shows how to add one from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shiradelta.combine.overlay import Overlay
from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Float32, Positions
from shiradelta.util.registry import Registry

#: The contributions -> the fused values, one per position of the overlay.
Merge = Callable[[Overlay], Float32]
#: (one delta's values, share to drop) -> the probability of keeping each nonzero.
Chances = Callable[[Float32, float], npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method: one way to fuse deltas.

    Attributes:
        name: what users call it.
        summary: what it does, in one sentence.
        merge: combines the contributions.
        chances: for methods that first drop nonzeros of each delta at random; None drops nothing.
        by_position: whether a position's value depends on its own contributions only.
    """

    name: str
    summary: str
    merge: Merge
    chances: Chances | None = None
    by_position: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The arguments of `fuse` that the method uses."""
        return ("drop", "seed") if self.chances else ()


#: Cosine from which two deltas count as parallel.
_PARALLEL = 0.9995

METHODS: Registry[MergeMethod] = Registry("merge method")


def merge_method(
    name: str, summary: str, *, chances: Chances | None = None, by_position: bool = False
) -> Callable[[Merge], Merge]:
    """Decorates a function from an `Overlay` to fused values, and adds it to `METHODS`.

    Args:
        name: what users call the method.
        summary: what it does, in one sentence.
        chances: for a method that first drops nonzeros at random: (values, share to drop) -> probability of staying.
        by_position: a position's value depends on its own contributions only.  So `fuse` gives the method windows of a
            tensor, and takes less memory.

    Raises:
        ArgumentError: the name is taken.
    """

    def add(merge: Merge) -> Merge:
        METHODS.add(MergeMethod(name=name, summary=summary, merge=merge, chances=chances, by_position=by_position))
        return merge

    return add


def methods_with(option: str) -> list[str]:
    """Names of the methods that use an argument of `fuse`."""
    return [name for name, method in METHODS.items() if option in method.options]


def unused_options(name: str) -> tuple[str, ...]:
    """The arguments of `fuse` that other methods use, but not this one."""
    every = dict.fromkeys(option for method in METHODS.values() for option in method.options)
    return tuple(option for option in every if option not in METHODS.find(name).options)


@merge_method("sum", "The sum: the same as applying the deltas together.", by_position=True)
def weighted_sum(overlay: Overlay) -> Float32:
    """The sum of the contributions."""
    return overlay.sum()


@merge_method("mean", "The sum divided by the number of deltas, whether or not they list a position.", by_position=True)
def mean(overlay: Overlay) -> Float32:
    """The sum divided by the number of inputs."""
    return overlay.sum() / np.float32(overlay.inputs)


@merge_method("max", "The contribution of largest magnitude; of equal ones the first.", by_position=True)
def largest(overlay: Overlay) -> Float32:
    """The contribution of largest magnitude."""
    result = np.full(overlay.positions.size, np.nan, np.float32)
    for at, values in zip(overlay.at, overlay.values, strict=True):
        wins = ~(np.abs(values) <= np.abs(result[at]))  # a comparison with NaN is false, so the first one wins
        result[at[wins]] = values[wins]
    return result


@merge_method("ties", "TIES: the mean of the contributions that have the sign of the sum.", by_position=True)
def ties(overlay: Overlay) -> Float32:
    """TIES (Yadav et al. 2023, arXiv:2306.01708, section 3).

    Its first step, trimming to the largest values, is what made the inputs sparse.
    """
    elected = np.sign(overlay.sum())
    count = np.zeros(overlay.positions.size, np.float32)

    def agrees(at: Positions, values: Float32) -> npt.NDArray[np.bool_]:
        agree: npt.NDArray[np.bool_] = np.sign(values) == elected[at]
        count[at] += agree
        return agree

    total = overlay.sum(agrees)
    return (total / np.maximum(count, 1)).astype(np.float32)


@merge_method("disjoint", "Each shared position goes to one of its deltas in turn, so that all lose equally many.")
def disjoint(overlay: Overlay) -> Float32:
    """Gives each shared position to one of its inputs, in turn."""
    counts = overlay.counts()
    turn = np.cumsum(counts > 1) % counts

    def has_its_turn(at: Positions, values: Float32) -> npt.NDArray[np.bool_]:
        mine: npt.NDArray[np.bool_] = turn[at] == 0
        turn[at] -= 1
        return mine

    return overlay.sum(has_its_turn)


@merge_method("slerp", "SLERP of two deltas: between their directions at a constant angle; the strengths are shares.")
def slerp(overlay: Overlay) -> Float32:
    """Spherical linear interpolation (Shoemake 1985) of two deltas of a tensor, the share of the second being t.

    Nearly parallel ones, and one that is zero, are interpolated linearly.
    """
    if overlay.inputs != 2 or min(overlay.strengths) <= 0:
        raise DeltaError("slerp takes two deltas with strengths above 0, which are their shares; give two")
    one, other = np.zeros((2, overlay.positions.size))
    for vector, at, values, strength in zip((one, other), overlay.at, overlay.values, overlay.strengths, strict=True):
        vector[at] = values / np.float64(strength)
    share = overlay.strengths[1] / sum(overlay.strengths)
    norms = np.sqrt(np.sum(one * one) * np.sum(other * other))
    cosine = float(np.sum(one * other) / norms) if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return np.asarray((1 - share) * one + share * other, np.float32)
    angle = np.arccos(cosine)
    first, second = np.sin([(1 - share) * angle, share * angle]) / np.sin(angle)
    return np.asarray(first * one + second * other, np.float32)


def uniform_chances(values: Float32, drop: float) -> npt.NDArray[np.float64]:
    """The same probability for every nonzero."""
    return np.full(values.size, 1 - drop)


def chances_by_rank(values: Float32, drop: float) -> npt.NDArray[np.float64]:
    """Drops small values more often: probability 1.5 `drop` for the smallest, 0.5 `drop` for the largest."""
    rank = np.empty(values.size)
    rank[np.argsort(np.abs(values), kind="stable")] = np.linspace(1.5, 0.5, values.size)
    return 1 - np.minimum(drop * rank, 0.99)


# DARE: Yu et al. 2023, arXiv:2311.03099.
merge_method("dare", "DARE: drops nonzeros at random, rescales the others, and sums.", chances=uniform_chances)(
    weighted_sum
)
# DELLA: Deep et al. 2024, arXiv:2406.11617.  Its second step, the election of signs as in TIES, is left out.
merge_method("della", "DELLA: as dare, but smaller changes are dropped more often.", chances=chances_by_rank)(
    weighted_sum
)


def drop_at_random(
    keep: npt.NDArray[np.float64], positions: Positions, values: Float32, *seed: object
) -> tuple[Positions, Float32]:
    """Drops nonzeros at random and divides the rest by their probability of being kept.

    Args:
        keep: for each nonzero, the probability of staying.
        positions: of the nonzeros.
        values: of the nonzeros.
        *seed: what the random numbers are derived from.

    Returns:
        (positions, values) of the nonzeros that stay.
    """
    digest = hashlib.sha256(" ".join(map(str, seed)).encode()).digest()
    stay = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).random(values.size) < keep
    return positions[stay], (values[stay] / keep[stay]).astype(np.float32)
