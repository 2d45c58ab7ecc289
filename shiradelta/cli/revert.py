"""`shiradelta revert`."""

from __future__ import annotations

import dataclasses

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines, progress_bar


@command(short_help="Take the last delta out of a model's folder, bit for bit.")
@click.argument("model")
@click.option("--force", is_flag=True, help="Restore the original weights even if they were changed since.")
@options.no_lock
@options.as_json
def revert(model: str, force: bool, no_lock: bool, as_json: bool) -> None:
    """Take the last delta out of the folder MODEL, bit for bit.

    If an action was interrupted, roll that back instead.
    """
    from shiradelta.folder.revert import revert as run

    with progress_bar("reverting") as progress:
        report = run(model, force=force, lock=not no_lock, progress=progress)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    did = "rolled back the interrupted action on" if report.interrupted else "took out"
    rest = f"{report.left} more applied" if report.left else "the folder is its base again"
    echo_lines(f"{model}: {did} {report.delta.file}, bit for bit; {rest}")
