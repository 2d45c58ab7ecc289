"""`shiradelta recode`."""

from __future__ import annotations

import dataclasses

import click

from shiradelta.cli import options
from shiradelta.cli.options import RegistryChoice, command
from shiradelta.cli.output import delta_from, echo_json, echo_lines, target
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import size


@command(
    to_stdout=True,
    extra="give one file to read and one to write",
    examples=[
        "recode 101.shd small.shd --base step_100/ --context base",
        "recode small.shd 101.shd --base step_100/ --context none",
    ],
)
@click.argument("source")
@click.argument("out")
@click.option("--base", required=True, metavar="MODEL", help="Folder or file of the model that it was made for.")
@click.option(
    "--context",
    type=RegistryChoice("shiradelta.io.context:CONTEXTS"),
    help="What a reader has: with the base the file can be smaller.  [default: the form that SOURCE does not have]",
)
@options.max_memory
@options.as_json
def recode(source: str, out: str, base: str, context: str | None, limit: str | None, as_json: bool) -> None:
    """Write the .shd file SOURCE to OUT in another form; both do the same.

    One form is smaller, and is read with its base only: for a file on its way to where the base is.  `shiradelta apply`
    takes either.  SOURCE may be - for stdin, OUT for stdout.
    """
    from shiradelta.folder.recode import recode as run

    with target(out, ".shd") as path, delta_from(source, limit) as delta, progress_bar("recoding") as progress:
        assert path is not None
        report = run(delta, path, base, context=context, limit=limit, progress=progress)
    report = dataclasses.replace(report, out=out)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    how = "read with its base only" if report.needs_base else "read by itself"
    if not report.needs_base and report.packed:
        how += ", and packed: its base would not make it smaller"
    elif not report.needs_base and report.source_bytes == report.file_bytes:
        how += ", as neither its base nor packing would make it smaller"
    share = report.file_bytes / max(report.source_bytes, 1)
    echo_lines(f"{out}: {size(report.file_bytes)}, {share:.2f} of {source}; {how}")
