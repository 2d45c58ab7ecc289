"""`shiradelta fuse`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines, named, target
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import count, percent


@command(
    to_stdout=True,
    examples=[
        "fuse style.shd:0.7 task.shd -o both.shd",
        "fuse style.shd task.shd --method ties --density 1% -o both.shd",
        "fuse --recipe merge.yml -o both.shd",
    ],
)
@click.argument("deltas", nargs=-1, metavar="FILE[:STRENGTH]...")
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
@click.option(
    "--density",
    type=options.SHARE,
    help="Keep only the largest changes of each tensor, this share of its elements.  [default: all]",
)
@click.option("--seed", default=0, show_default=True, help="Random seed, for methods that drop nonzeros.")
@click.option("--base", metavar="MODEL", help="Folder or file of the base model; puts fingerprints into the result.")
@click.option("--recipe", metavar="FILE", help="YAML file with the deltas, and the options above.")
@options.max_memory
@options.as_json
def fuse(deltas: tuple[str, ...], out: str, recipe: str | None, as_json: bool, **arguments: Any) -> None:
    """Fuse .shd files into one, without a model.

    A recipe names the files, with strengths by tensors or by layers, and the options: docs/combine.md has one.
    """
    from shiradelta.combine.fuse import fuse as run
    from shiradelta.combine.methods import methods_with, unused_options
    from shiradelta.format.registry import SUFFIX

    if recipe is not None:
        if given := "FILE" if deltas else options.given("method", "values", "drop", "density", "seed", "base"):
            raise click.UsageError(f"{given} is for fusing without a recipe; write it into {recipe}, or leave it out.")
        from shiradelta.combine.recipe import read_recipe

        settings: dict[str, Any] = {"limit": arguments["limit"], **read_recipe(recipe)}
    else:
        if not deltas:
            raise click.UsageError("Missing argument 'FILE[:STRENGTH]...'; name files to fuse, or --recipe FILE.")
        settings = {"deltas": options.with_strengths(deltas), **arguments}
    if given := options.given(*unused_options(arguments["method"])):
        methods = methods_with(given.removeprefix("--"))
        raise click.UsageError(f"{given} is an option of {' and '.join(methods)}; add --method {methods[0]}, say.")
    with target(out, SUFFIX) as path, progress_bar("fusing") as progress:
        report = run(out=str(path), **settings, progress=progress)
    report = dataclasses.replace(report, out=out)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(
        f"{named(report.out, 'stdout')}: {count(report.tensors, 'tensor')}, {count(report.nnz, 'nonzero')} of"
        f" {report.input_nnz:,} in the inputs",
        f"{report.shared:,} of them ({percent(report.shared / max(report.nnz, 1))}) are in several inputs,"
        f" {percent(report.conflicts / max(report.shared, 1))} of these with opposite signs;"
        " `shiradelta report` shows more",
    )
