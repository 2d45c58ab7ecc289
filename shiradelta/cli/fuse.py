"""`shiradelta fuse`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, progress_bar
from shiradelta.util.text import percent


@command(short_help="Several deltas into one.")
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", required=True, help="The file to write.")
@click.option(
    "--method",
    type=click.Choice(["sum", "mean", "max", "ties", "disjoint", "dare", "della"]),
    default="sum",
    show_default=True,
    help="How shared weights are settled; sum is what applying them together does.",
)
@options.values("f32")
@click.option("--drop", default=0.5, show_default=True, help="The share that dare and della drop.")
@click.option("--seed", default=0, show_default=True, help="Of dare and della.")
@click.option("--base", metavar="MODEL", help="The base model, for fingerprints in the result.")
@options.as_json
def fuse(deltas: tuple[str, ...], as_json: bool, **arguments: Any) -> None:
    """Fuse .shd files into one, without a model: style.shd:0.7 task.shd:1.0."""
    from shiradelta.combine.fuse import fuse as run

    if arguments["method"] not in ("dare", "della") and (given := options.given("drop", "seed")):
        raise click.UsageError(f"{given} is of dare and della; give --method, too.")
    with progress_bar("fusing") as progress:
        report = run(options.with_strengths(deltas), **arguments, progress=progress)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.out}: {report.tensors} tensors, {report.nnz:,} nonzeros of {report.input_nnz:,} in the inputs\n"
        f"{report.shared:,} of them ({percent(report.shared / max(report.nnz, 1))}) are touched by several inputs,"
        f" {percent(report.conflicts / max(report.shared, 1))} of these in opposite directions;"
        " `shiradelta report` tells more"
    )
