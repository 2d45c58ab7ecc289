"""How many elements of each tensor are kept: a share of every one, or the largest of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from shiradelta.errors import DeltaError, SourceError
from shiradelta.select import count_for
from shiradelta.spectrum import Spectrum, allocate

from .item import Item

SCOPES = ("tensor", "model")


class Counts:
    """Sparsity -> number of elements, by tensor."""

    def __init__(self, items: Sequence[Item], scope: str, progress: Callable[[str, int, int], None]) -> None:
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
