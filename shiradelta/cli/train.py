"""`shiradelta train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, progress_bar
from shiradelta.util.text import size


@command(short_help="Train a sparse adapter.")
@click.argument("model")
@click.option("--texts", required=True, help="What to train on: JSON Lines, with keys as above.")
@click.option("-o", "--out", required=True, help="The file to write.")
@click.option("--sparsity", default="0.01", show_default=True, help="The share of the weights that change, or N:M.")
@click.option(
    "--mask",
    type=click.Choice(["snip", "grad", "wm", "rand", "struct"]),
    default="snip",
    show_default=True,
    help="Which: by weight times gradient, by gradient, by weight, at random, by rows and diagonals.",
)
@click.option("--targets", help="Layers to train, such as q_proj,v_proj.  [default: all linear ones but the output's]")
@options.scope("Train the share of every tensor, or of all of them together.")
@click.option(
    "--fall-from",
    type=float,
    help="Begin at so many times the sparsity, and let training find what matters; 1 keeps the mask.  [default: 5,"
    " but 1 for struct and N:M]",
)
@click.option("--avoid", multiple=True, metavar="FILE", help="A .shd whose weights are not to be touched; repeatable.")
@click.option("--steps", default=400, show_default=True, help="Optimizer steps.")
@click.option("--batch", default=32, show_default=True, help="Examples a step.")
@click.option("--rate", default=0.04, show_default=True, help="Learning rate, in units of a weight's rms.")
@click.option("--tokens", default=256, show_default=True, help="Where examples are cut.")
@click.option("--seed", default=0, show_default=True, help="Of the order, and of a random mask.")
@options.values("int4")
@click.option("--device", help="Where to train.  [default: a GPU, if there is one]")
@click.option("--plot", help="Draw the losses to this PNG.")
@options.as_json
def train(
    model: str,
    texts: str,
    out: str,
    targets: str | None,
    device: str | None,
    plot: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a sparse adapter for the folder MODEL: a share of its weights, the rest as it is.

    A line of the texts is {"text": ...} for a causal language model, {"prompt": ..., "completion": ...} for one that
    is to answer, or {"anchor": ..., "positive": ...} for an encoder that is to find one by the other.

    Started again, an interrupted run goes on.
    """
    from shiradelta.train.run import Settings, run

    names = tuple(name.strip() for name in (targets or "").split(",") if name.strip())
    with progress_bar("training") as progress:
        report = run(
            Path(model),
            Path(texts),
            Path(out),
            Settings(targets=names, **settings),
            device,
            None if plot is None else Path(plot),
            lambda line: click.echo(line, err=True),
            progress,
        )
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.nnz:,} of {report.numel:,} weights in {report.tensors} tensors trained, {report.steps} steps in"
        f" {report.seconds:.0f} s; loss on {report.held_out} examples held out: {report.before:.4g} before,"
        f" {report.trained:.4g} after, {report.after:.4g} with the file's values\n"
        f"{report.out}: {size(report.file_bytes)}; patch it in with: shiradelta apply {model} {report.out}"
    )
