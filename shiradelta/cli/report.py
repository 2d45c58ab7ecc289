"""`shiradelta report`."""

from __future__ import annotations

import os

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import DASH, echo_json, echo_lines, echo_text, echo_warnings, target, terminal_width
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import size


@command(
    to_stdout=True,
    examples=["report style.shd task.shd", "report style.shd:0.7 task.shd -o report.html --png heat.png"],
)
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", metavar="FILE", help="Write an HTML page that needs no network; - for stdout.")
@click.option("--png", metavar="FILE", help="Write the heat map, layers by pairs, to this PNG.")
@options.max_memory
@options.as_json
def report(deltas: tuple[str, ...], out: str | None, png: str | None, limit: str | None, as_json: bool) -> None:
    """Report what is in .shd files and how much each two of them interfere, before they are fused."""
    from shiradelta.combine.report import report as run
    from shiradelta.combine.report.text import summary

    with target(out, ".html") as page, progress_bar("comparing") as progress:
        made = run(options.with_strengths(deltas), out=page, png=png, progress=progress, limit=limit)
    if as_json:
        echo_json(made.as_dict())
        return
    echo_text(summary(made, terminal_width()))
    echo_warnings(made.interference.warnings)
    for written in filter(None, (None if out == DASH else out, png)):
        echo_lines(f"{written}: written, {size(os.path.getsize(written))}")
