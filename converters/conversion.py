"""Selects from a source's items, quantises, writes and reports, with one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.io.recognise import UNCHANGED
from shiradelta.io.writer import DeltaWriter, weighing
from shiradelta.select.counts import Counts
from shiradelta.select.topk import Selection, top_k
from shiradelta.util.progress import Progress
from shiradelta.util.text import parse_size
from shiradelta.util.version import made_by

from .aim import Aim, ErrorAim, SizeAim, Trial, find_fitted_sparsity, find_sparsity
from .exactness import Inexact
from .item import Item, Source
from .report import ConversionReport, TensorReport
from .together import Crew
from .whole import Losses

#: What a file's metadata say of a figure that cannot be computed.
UNKNOWN = "unknown"

if TYPE_CHECKING:
    from shiradelta.fit.fitted import Fitted


@dataclass(frozen=True)
class Conversion:
    """A conversion without its sparsity: everything but how many elements are kept."""

    source: str
    target: Path
    opened: Source
    losses: Losses
    values: str
    zstd: bool
    backend: str
    pairs: Mapping[str, str]
    metadata: Mapping[str, str]
    progress: Progress

    def find_sparsity(self, counts: Counts, size: str | int | None, error: float | None, fitted: bool) -> float:
        """The sparsity that gives a file of at most that size, or a delta of at most that error.

        Raises:
            SourceError: no sparsity does.
        """
        if error is not None:
            if self.losses.unknown:  # trials for a size do without the error
                raise SourceError(
                    f"{self.source}: the error is unknown, as nothing tells the change of {self.losses.unknown[0]!r},"
                    " which is skipped; give a sparsity or a target size"
                )
            aim: Aim = ErrorAim(error, counts, self.values, self.losses.energy)
        else:
            assert size is not None
            if fitted:
                return find_fitted_sparsity(counts, self.values, parse_size(size) - self._fixed(counts))
            aim = SizeAim(parse_size(size), counts, self.values)
        return find_sparsity(aim, lambda sparsity: self._weigh(sparsity, counts(sparsity)))

    @cached_property
    def _at_least(self) -> Callable[[Float32, float], Positions]:
        """The backend's function for the indices where |x| >= threshold."""
        return choose(self.backend).at_least

    def _fixed(self, counts: Counts) -> int:
        """Bytes of everything except the positions and values of dense deltas."""
        one = {name: min(1, spectrum.nonzero) for name, spectrum in counts.spectra.items()}
        sections = 2 * registry.SECTION_ALIGNMENT * sum(one.values())
        return self._weigh(0, one).size - sections

    def _weigh(self, sparsity: float, kept: Mapping[str, int]) -> Trial:
        """The conversion without the writing."""
        writer = weighing(self.values, self.zstd, self.backend)
        report = self.write(writer, sparsity, kept, None, compare=False)
        return Trial(writer.size, math.nan if report.error is None else report.error)

    def write(
        self,
        writer: DeltaWriter,
        sparsity: float,
        kept: Mapping[str, int],
        fitted: Fitted | None,
        compare: bool = True,
        crew: Crew | None = None,
    ) -> ConversionReport:
        """Selects, unless fitting has done so, and gives all tensors to the writer.

        Args:
            writer: takes the tensors.
            sparsity: the share of weights that change, for the report.
            kept: name -> how many elements are selected.
            fitted: the result of a fit, if there was one.
            compare: count the elements that are not the fine-tune's.
            crew: the processes that convert a part of the tensors each; None for this one alone.

        Raises:
            SourceError: nothing changes the base, or another process could not convert its part.
        """
        report = ConversionReport(self.source, str(self.target), sparsity, self.values, fit=fitted)
        report.skipped.update({name: str(skipped) for name, skipped in self.opened.skipped.items()})
        report.lost.update(self.losses.energies)
        report.energy_left_out = self.losses.energy
        report.warnings.extend(self.losses.warnings)
        report.warnings.extend(self.opened.warnings)
        report.warnings.extend(fitted.warnings if fitted else [])
        selections = fitted.tensors if fitted else {}
        items = self.opened.items

        def converted(number: int) -> TensorReport:
            item = items[number]
            self.progress(item.name, number, len(items))
            return self._add(writer, item, kept.get(item.name, 0), selections.get(item.name), compare)

        for tensor in (crew or Crew()).reports(writer, len(items), converted):
            if tensor.nnz or tensor.operation.removes:
                report.tensors.append(tensor)
            else:
                report.leave_out(tensor)
        if not report.tensors:
            raise SourceError(f"{self.source}: {UNCHANGED}")
        kept_energy = UNKNOWN if report.energy_kept is None else f"{report.energy_kept:.4f}"
        writer.metadata.update(
            {
                "created_by": made_by() if fitted is None else made_by("torch", "transformers"),
                "method": "topk" if fitted is None else "fit",
                "sparsity": f"{sparsity:g}",
                **({"energy_kept": kept_energy} if fitted is None else fitted.metadata),
                **({"exactness": report.exactness} if report.exact is not None else {}),
                **self.losses.metadata,
                **self.pairs,
                **self.metadata,
            }
        )
        return report

    def _add(self, writer: DeltaWriter, item: Item, k: int, fitted: Selection | None, compare: bool) -> TensorReport:
        """Adds one tensor, if any of it is selected; `compare` counts the elements that are not the fine-tune's."""
        base = None
        try:
            if item.dense is not None:
                selection = fitted or top_k(item.dense(), item.matrix, k, self._at_least)
                base = None if item.base_bits is None else item.base_bits()
                tensor = _delta_of(item, selection, base, is_fitted=fitted is not None)
                energy, selected = selection.energy, selection.values
            else:
                assert item.exact is not None
                tensor = item.exact()
                selected = tensor.values() if tensor.operation.adds else np.zeros(0, np.float32)
                energy = float((selected.astype("f8") ** 2).sum())
            inexact = Inexact(item, base) if compare else None
            stored = tensor
            if tensor.nnz or tensor.operation.removes:
                stored = writer.add(item.name, tensor, see=None if inexact is None else inexact.see)
        except SourceError as error:
            raise SourceError(f"tensor {item.name!r} {error}") from None
        count = None if inexact is None else inexact.count
        return TensorReport.of(item.name, tensor, stored, energy, selected, count)


def _delta_of(item: Item, selection: Selection, base: Array | None, is_fitted: bool) -> TensorDelta:
    """The tensor delta of selected elements.

    Args:
        item: the tensor.
        selection: what is selected of it.
        base: the base's elements, flat; None without a base.
        is_fitted: it is not what `top_k` has selected: it is checked, and may be anywhere.
    """
    at, values, op = selection.positions, selection.values, "add"
    if item.replaces:
        assert item.tuned is not None
        values, op = item.tuned()[at], "set"
    draw = item.draw if item.draw is not None and not is_fitted and np.all(values) else None
    make = TensorDelta if is_fitted else TensorDelta.trusted
    return make(item.shape, at, values, item.dtype, op, None if base is None else base[at], draw=draw)
