"""`shiradelta verify`."""

from __future__ import annotations

import dataclasses
import sys

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines


@command(short_help="Check whether a model's folder is base, patched or neither.")
@click.argument("model")
@click.argument("delta", required=False)
@options.as_json
def verify(model: str, delta: str | None, as_json: bool) -> None:
    """Check whether the folder MODEL is exactly its base, exactly patched, or neither (exit code 1).

    Only weights listed in the applied deltas are checked.

    If nothing is applied, the folder is compared with the fingerprints in DELTA.
    """
    from shiradelta.folder.verification import verify as run

    report = run(model, delta)
    if as_json:
        echo_json(dataclasses.asdict(report))
    else:
        if report.recovered:
            echo_lines(f"{model}: an interrupted action was rolled back")
        echo_lines(f"{model}: {report.state}: {report.detail}")
    if report.state == "neither":
        sys.exit(1)
