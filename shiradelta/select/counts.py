"""Counts the elements to select from each tensor: a share of every tensor, or the largest of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from shiradelta.errors import SourceError
from shiradelta.select.histogram import allocate
from shiradelta.select.shares import check_scope, count_for
from shiradelta.select.spectrum import Spectrum
from shiradelta.select.topk import Rows
from shiradelta.util.progress import Progress


class Candidate(Protocol):
    """A tensor to select elements from; a tensor without a dense delta is stored whole."""

    @property
    def name(self) -> str:
        """The base's name for it."""

    @property
    def numel(self) -> int:
        """Elements."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) in which the dense delta is made."""

    @property
    def dense(self) -> Callable[[], Rows] | None:
        """Opens the dense delta."""


class Counts:
    """Number of elements to select, by tensor, for a sparsity.

    Args:
        items: the tensors.
        scope: one of `SCOPES`.
        progress: called with (what, done, total).
    """

    def __init__(self, items: Sequence[Candidate], scope: str, progress: Progress) -> None:
        check_scope(scope)
        self.dense = {item.name: item for item in items if item.dense is not None}
        self.numel = sum(item.numel for item in self.dense.values())
        self.scope, self._progress = scope, progress

    @cached_property
    def spectra(self) -> Mapping[str, Spectrum]:
        """Spectrum of every tensor; the first use makes a pass over all of them.  Raises SourceError."""
        found: dict[str, Spectrum] = {}
        for number, item in enumerate(self.dense.values()):
            self._progress(f"looking at {item.name}", number, len(self.dense))
            assert item.dense is not None
            try:
                found[item.name] = Spectrum.of(item.dense(), item.matrix)
            except SourceError as error:
                raise SourceError(f"tensor {item.name!r} {error}") from None
        return found

    def __call__(self, sparsity: float) -> dict[str, int]:
        """Number of elements to select from each tensor that has a dense delta."""
        if self.scope == "model":
            changing = (item.numel for name, item in self.dense.items() if self.spectra[name].nonzero)
            return allocate(self.spectra, count_for(sparsity, sum(changing)))
        return {name: count_for(sparsity, item.numel) for name, item in self.dense.items()}

    def kept(self, sparsity: float) -> dict[str, int]:
        """The same numbers, but at most the number of nonzero elements of each tensor."""
        return {name: min(count, self.spectra[name].nonzero) for name, count in self(sparsity).items()}
