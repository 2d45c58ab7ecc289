"""`shiradelta fuse`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines, target
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import count, percent


@command(
    short_help="Fuse several deltas into one.",
    examples=["fuse style.shd:0.7 task.shd -o both.shd", "fuse style.shd task.shd --method ties -o both.shd"],
)
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", required=True, metavar="FILE", help="File to write, - for stdout.")
@click.option(
    "--method",
    type=options.RegistryChoice("shiradelta.combine.methods:METHODS"),
    default="sum",
    show_default=True,
    help="How values at the same weight are combined; sum equals applying all deltas together.",
)
@options.values("f32")
@click.option(
    "--drop",
    type=options.SHARE,
    default=0.5,
    show_default=True,
    help="Share of nonzeros to drop, for methods that drop some.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed, for methods that drop nonzeros.")
@click.option("--base", metavar="MODEL", help="Folder or file of the base model; puts fingerprints into the result.")
@options.max_memory
@options.as_json
def fuse(deltas: tuple[str, ...], out: str, as_json: bool, **arguments: Any) -> None:
    """Fuse .shd files into one, without a model."""
    from shiradelta.combine.fuse import fuse as run
    from shiradelta.combine.methods import methods_with, unused_options
    from shiradelta.format.registry import SUFFIX

    if given := options.given(*unused_options(arguments["method"])):
        methods = methods_with(given.removeprefix("--"))
        raise click.UsageError(f"{given} is an option of {' and '.join(methods)}; add --method {methods[0]}, say.")
    with target(out, SUFFIX) as path, progress_bar("fusing") as progress:
        report = run(options.with_strengths(deltas), str(path), **arguments, progress=progress)
    report = dataclasses.replace(report, out=out)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(
        f"{report.out}: {count(report.tensors, 'tensor')}, {count(report.nnz, 'nonzero')} of"
        f" {report.input_nnz:,} in the inputs",
        f"{report.shared:,} of them ({percent(report.shared / max(report.nnz, 1))}) are in several inputs,"
        f" {percent(report.conflicts / max(report.shared, 1))} of these with opposite signs;"
        " `shiradelta report` shows more",
    )
