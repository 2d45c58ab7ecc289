"""What is in some deltas and how they meet: as data, as one HTML file that needs no network, as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.combine.fuse import Progress, Source
from shiradelta.combine.interference import Interference, measure
from shiradelta.combine.report import page
from shiradelta.combine.report.adapters import Adapter, look_at
from shiradelta.combine.report.verdict import verdict
from shiradelta.errors import DeltaError
from shiradelta.io.reader import open_delta
from shiradelta.util.files import check_target
from shiradelta.util.plots import check_plot


@dataclass(frozen=True)
class Report:
    """What `report` found: each delta by itself, and every two of them together."""

    adapters: tuple[Adapter, ...]
    interference: Interference

    def verdicts(self) -> dict[tuple[int, int], str]:
        """Pair -> a plain sentence."""
        labels = self.interference.labels
        return {
            (i, j): verdict(labels[i], labels[j], self.interference.total((i, j))) for i, j in self.interference.pairs
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        found, labels = self.interference, self.interference.labels
        pairs = [
            {
                "deltas": [labels[i], labels[j]],
                "verdict": sentence,
                "total": found.total((i, j)).as_dict(),
                "layers": {layer: meeting.as_dict() for layer, meeting in found.layers((i, j)).items()},
                "tensors": {name: meeting.as_dict() for name, meeting in found.pairs[i, j].items()},
            }
            for (i, j), sentence in self.verdicts().items()
        ]
        return {
            "deltas": [adapter.as_dict() for adapter in self.adapters],
            "pairs": pairs,
            "warnings": list(found.warnings),
        }


def report(
    deltas: Mapping[Source, float],
    out: Source | None = None,
    png: Source | None = None,
    progress: Progress | None = None,
) -> Report:
    """Looks at `.shd` files, alone and two by two.

    Args:
        deltas: file -> strength, as for `fuse`.
        out: an HTML file to write.
        png: a picture of the heat map to write; needs matplotlib.
        progress: is told how far it is.

    Raises:
        BaseMismatchError: the files were made against different bases.
        DeltaError: the same delta twice, or an argument that cannot be.
        FormatError: a file is refused.
        MissingDependencyError: matplotlib is not installed.
        TargetError: a file cannot be written, or something else is there.
    """
    if not deltas:
        raise DeltaError("nothing to report on; give at least one .shd file")
    if png is not None and len(deltas) < 2:
        raise DeltaError("a heat map needs two deltas; give another .shd file")
    if out is not None:
        check_target(Path(out), page.START, "a page of HTML")
    if png is not None:
        check_plot(png)
    found = measure(deltas, progress)
    with ExitStack() as stack:
        adapters = tuple(
            look_at(stack.enter_context(open_delta(path)), label, strength)
            for (path, strength), label in zip(deltas.items(), found.labels, strict=True)
        )
    made = Report(adapters, found)
    if out is not None:
        page.write(Path(out), made)
    if png is not None:
        from shiradelta.combine.report.heat import draw

        draw(Path(png), found)
    return made
