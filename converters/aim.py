"""Finds the sparsity for a given file size, or for a given error of the delta.

A model predicts both from the codecs' sizes and the distribution of magnitudes, and says where to try.  A trial is the
whole conversion without the writing, so the file keeps the limit by measure, not by prediction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.codecs import VALUE_OPTIONS, rice
from shiradelta.select.counts import Counts

#: The search ends if a trial keeps the limit and is this close to it, or if the sparsity is this certain.
CLOSE, KNOWN = 0.005, 1.002
TRIALS = 12
#: Upper bounds in bytes: a fitted file's metadata, and the padding of a tensor whose count may change.
_FIT_METADATA, _PADDING = 1664, 192


@dataclass(frozen=True)
class Trial:
    """The result of a trial: the file's bytes, and the relative error of its delta."""

    size: int
    error: float


class Aim(ABC):
    """A limit, and how to approach it.  `model` and `measured` have the same unit."""

    #: Whether few elements keep the limit (else many do).
    few: bool

    def __init__(self, limit: float, counts: Counts, codec: str) -> None:
        self.limit, self.counts, self.codec = limit, counts, codec

    @abstractmethod
    def model(self, sparsity: float) -> float:
        """Predicts what a trial would measure; monotone in the sparsity."""

    @abstractmethod
    def measured(self, trial: Trial) -> float:
        """The figure of a trial that has to keep the limit."""

    @property
    def close(self) -> float:
        """The distance from the limit that is close enough."""
        return CLOSE * self.limit

    @abstractmethod
    def impossible(self, best: Trial) -> str:
        """The message if even the end of the range does not keep the limit."""


class SizeAim(Aim):
    """A file of at most `limit` bytes."""

    few = True

    def model(self, sparsity: float) -> float:
        # The most that so many elements can take: the size of evenly spread positions.
        return sum(most_bytes(self._numel(name), k, self.codec) for name, k in self.counts.kept(sparsity).items())

    @property
    def close(self) -> float:
        """Sections are padded: tensors of the same shape grow by a block of 64 bytes all at once."""
        return max(super().close, registry.SECTION_ALIGNMENT * len(self.counts.dense))

    def _numel(self, name: str) -> int:
        return self.counts.dense[name].numel

    def measured(self, trial: Trial) -> float:
        return trial.size

    def impossible(self, best: Trial) -> str:
        return (
            f"a file of {self.limit:,.0f} bytes is too small: one weight in each tensor takes {best.size:,} already;"
            " give more"
        )


class ErrorAim(Aim):
    """A delta with at most that relative error; the unit is the squared error."""

    few = False

    def __init__(self, limit: float, counts: Counts, codec: str, lost: float = 0.0) -> None:
        super().__init__(limit**2, counts, codec)
        self._wanted, self._lost = limit, lost
        self._energy = lost + sum(spectrum.energy for spectrum in counts.spectra.values())

    def model(self, sparsity: float) -> float:
        # The share of the energy that is not selected, without rounding.
        kept = self.counts.kept(sparsity)
        left = sum(spectrum.energy_beyond(kept[name]) for name, spectrum in self.counts.spectra.items())
        return (left + self._lost) / self._energy if self._energy else 0.0

    def measured(self, trial: Trial) -> float:
        return trial.error**2

    def impossible(self, best: Trial) -> str:
        # Rounding more values to few bits may be worse than leaving them out.
        skipped = f", and what is skipped {(self._lost / self._energy) ** 0.5:.3g} alone" if self._lost else ""
        return (
            f"an error of {self._wanted:g} cannot be reached with {self.codec} values, which leave {best.error:.3g} at"
            f" best{skipped}; take --values f32 or a larger error"
        )


def most_bytes(numel: int, count: int, codec: str) -> int:
    """The most bytes that `count` of a tensor's elements take in a file, wherever they are."""
    if not count:
        return 0
    index = min(
        rice.section_size(count, numel, k, count + ((numel - count) >> k)) for k in range(registry.MAX_RICE_K + 1)
    )
    value = VALUE_OPTIONS[codec].size(count, 4)
    return sum(registry.align(size, registry.SECTION_ALIGNMENT) for size in (index, value))


def find_sparsity(aim: Aim, trial: Callable[[float], Trial]) -> float:
    """The sparsity that just keeps the limit, as trials measure it.

    Raises:
        SourceError: no sparsity keeps it.
    """
    least, most = _range(aim.counts)
    good, bad = (least, most) if aim.few else (most, least)
    tried: dict[tuple[int, ...], Trial] = {}

    def attempt(sparsity: float) -> float:
        key = tuple(aim.counts.kept(sparsity).values())
        if key not in tried:
            tried[key] = trial(sparsity)
        return aim.measured(tried[key])

    known, offset = False, 0.0  # whether `good` was tried; the model's error
    for _ in range(TRIALS):
        sparsity = _inverse(aim.model, aim.limit - aim.close / 4 - offset, aim.few, least, most)
        if known and not min(good, bad) < sparsity < max(good, bad):
            sparsity = math.sqrt(good * bad)
        found = attempt(sparsity)
        offset = found - aim.model(sparsity)
        if found <= aim.limit:
            good, known = sparsity, True
            if found >= aim.limit - aim.close or sparsity == (most if aim.few else least):
                return sparsity
        else:
            bad = sparsity
        if (known and max(good, bad) / min(good, bad) < KNOWN) or aim.counts.kept(good) == aim.counts.kept(bad):
            break
    if not known and attempt(good) > aim.limit:
        raise SourceError(aim.impossible(min(tried.values(), key=aim.measured)))
    return good


def find_fitted_sparsity(counts: Counts, codec: str, room: int) -> float:
    """The sparsity whose positions and values take at most `room` bytes, wherever fitting puts them.

    Raises:
        SourceError: no sparsity does.
    """

    def most_in_all(sparsity: float) -> float:
        kept = counts.kept(sparsity)
        if counts.scope == "tensor":
            return sum(most_bytes(counts.dense[name].numel, count, codec) for name, count in kept.items())
        # Elements may move between tensors; the bound is concave, so an even spread is the worst.
        changed = sum(spectrum.nonzero > 0 for spectrum in counts.spectra.values())
        return most_bytes(counts.numel, sum(kept.values()), codec) + _PADDING * changed

    room -= _FIT_METADATA
    least, most = _range(counts)
    if most_in_all(least) > room:
        raise SourceError(
            f"a fitted file of this size is too small: one weight in each tensor takes up to"
            f" {most_in_all(least) - room:,.0f} bytes more; give a larger one"
        )
    return _inverse(most_in_all, room, True, least, most)


def _range(counts: Counts) -> tuple[float, float]:
    """The smallest sparsity that keeps an element, and the largest."""
    return 1 / max(counts.numel, 1), 1.0


def _inverse(model: Callable[[float], float], wanted: float, rising: bool, least: float, most: float) -> float:
    """The sparsity at which a monotone model just stays within `wanted`, by bisection of its logarithm."""
    small, large = (least, most) if rising else (most, least)
    if model(large) <= wanted:
        return large
    if model(small) >= wanted:
        return small
    low, high = math.log(small), math.log(large)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if model(math.exp(middle)) <= wanted else (low, middle)
    return math.exp(low)
