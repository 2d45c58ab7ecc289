"""How many elements of each tensor are kept: a share of every one, or the largest of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from shiradelta.errors import DeltaError, SourceError
from shiradelta.select.spectrum import Spectrum, allocate
from shiradelta.select.topk import Rows, count_for
from shiradelta.util.progress import Progress

SCOPES = ("tensor", "model")


class Candidate(Protocol):
    """A tensor to select from; one without a dense delta is stored as it is."""

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
    """Sparsity -> number of elements, by tensor."""

    def __init__(self, items: Sequence[Candidate], scope: str, progress: Progress) -> None:
        if scope not in SCOPES:
            raise DeltaError(f"scope {scope!r} is unknown; take {' or '.join(SCOPES)}")
        self.dense = {item.name: item for item in items if item.dense is not None}
        self.numel = sum(item.numel for item in self.dense.values())
        self.scope, self._progress = scope, progress

    @cached_property
    def spectra(self) -> Mapping[str, Spectrum]:
        """Of every tensor; takes one pass over all of them.  Raises SourceError."""
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
        """Of tensors that have a dense delta."""
        if self.scope == "model":
            changing = (item.numel for name, item in self.dense.items() if self.spectra[name].nonzero)
            return allocate(self.spectra, count_for(sparsity, sum(changing)))
        return {name: count_for(sparsity, item.numel) for name, item in self.dense.items()}

    def kept(self, sparsity: float) -> dict[str, int]:
        """As called, but no more than there are changes."""
        return {name: min(count, self.spectra[name].nonzero) for name, count in self(sparsity).items()}
