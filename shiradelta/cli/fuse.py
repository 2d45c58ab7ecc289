"""`shiradelta fuse`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, progress_bar
from shiradelta.util.text import percent


@command(short_help="Fuse several deltas into one.")
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", required=True, metavar="FILE", help="File to write.")
@click.option(
    "--method",
    type=click.Choice(["sum", "mean", "max", "ties", "disjoint", "dare", "della"]),
    default="sum",
    show_default=True,
    help="How values at the same weight are combined; sum equals applying all deltas together.",
)
@options.values("f32")
@click.option("--drop", default=0.5, show_default=True, help="Share of nonzeros that dare and della drop.")
@click.option("--seed", default=0, show_default=True, help="Random seed of dare and della.")
@click.option("--base", metavar="MODEL", help="Folder or file of the base model; puts fingerprints into the result.")
@options.as_json
def fuse(deltas: tuple[str, ...], as_json: bool, **arguments: Any) -> None:
    """Fuse .shd files into one, without a model.

    Example: shiradelta fuse style.shd:0.7 task.shd:1.0 -o both.shd
    """
    from shiradelta.combine.fuse import fuse as run

    if arguments["method"] not in ("dare", "della") and (given := options.given("drop", "seed")):
        raise click.UsageError(f"{given} is an option of dare and della; add --method dare or --method della.")
    with progress_bar("fusing") as progress:
        report = run(options.with_strengths(deltas), **arguments, progress=progress)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.out}: {report.tensors} tensors, {report.nnz:,} nonzeros of {report.input_nnz:,} in the inputs\n"
        f"{report.shared:,} of them ({percent(report.shared / max(report.nnz, 1))}) are in several inputs,"
        f" {percent(report.conflicts / max(report.shared, 1))} of these with opposite signs;"
        " `shiradelta report` shows more"
    )
