"""`report`: what deltas contain and how much they overlap, as data, as an HTML file and as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from shiradelta.combine.checks import check_readable
from shiradelta.combine.fuse import Source
from shiradelta.combine.interference import measure
from shiradelta.combine.report import page
from shiradelta.combine.report.data import DeltaReport
from shiradelta.combine.report.profiles import profile
from shiradelta.errors import ArgumentError
from shiradelta.io.reader import open_delta
from shiradelta.util.arguments import STRENGTHS, checked
from shiradelta.util.files import check_target
from shiradelta.util.plots import check_plot
from shiradelta.util.progress import Progress


@checked(deltas=STRENGTHS)
def report(
    deltas: Mapping[Source, float],
    out: Source | None = None,
    png: Source | None = None,
    progress: Progress | None = None,
    *,
    limit: int | str | None = None,
) -> DeltaReport:
    """Describes `.shd` files and measures how much each pair overlaps.

    Args:
        deltas: file -> strength, as for `fuse`.
        out: an HTML file to write.
        png: a picture of the heat map to write; needs matplotlib.
        progress: called with (tensor, done, total).
        limit: the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        BaseMismatchError: the files were made against different bases.
        ArgumentError: no delta is given, or a heat map is asked for one delta.
        DeltaError: a delta is given twice, or a strength is not allowed.
        FormatError: a file is refused.
        LimitError: a tensor takes more memory than `limit` allows.
        MissingDependencyError: matplotlib is not installed.
        TargetError: a file cannot be written, or a file of another kind has its name.
    """
    if not deltas:
        raise ArgumentError("nothing to report on; give at least one .shd file")
    if png is not None and len(deltas) < 2:
        raise ArgumentError("a heat map needs two deltas; give another .shd file")
    check_readable(deltas)
    if out is not None:
        check_target(Path(out), page.START, "a page of HTML")
    if png is not None:
        check_plot(png)
    found = measure(deltas, progress, limit=limit)
    with ExitStack() as stack:
        adapters = tuple(
            profile(stack.enter_context(open_delta(path, limit=limit)), label, strength)
            for (path, strength), label in zip(deltas.items(), found.labels, strict=True)
        )
    made = DeltaReport(adapters, found)
    if out is not None:
        page.write(Path(out), made)
    if png is not None:
        from shiradelta.combine.report.heat import draw

        draw(Path(png), found)
    return made
