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
@click.option("--full", is_flag=True, help="Compare all weights with the digests of the base's files.")
@options.as_json
def verify(model: str, delta: str | None, full: bool, as_json: bool) -> None:
    """Check whether the folder MODEL is exactly its base, exactly patched, or neither (exit code 1).

    Only weights listed in the applied deltas are checked, with DELTA against its own fingerprints and values, too.

    If nothing is applied, the folder is compared with the fingerprints in DELTA, or with the digests that the last
    revert has left.  Without either its state is unknown (exit code 1).

    Nothing is written: an interrupted action is rolled back by `shiradelta revert`.
    """
    from shiradelta.folder.verification import verify as run

    report = run(model, delta, full=full)
    if as_json:
        echo_json(dataclasses.asdict(report))
    else:
        echo_lines(f"{model}: {report.state}: {report.detail}")
    if report.state in ("neither", "unknown"):
        sys.exit(1)
