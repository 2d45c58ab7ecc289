"""`shiradelta train`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import count, size


@command(
    extra="give the examples as --texts FILE, and the file to write as -o FILE",
    examples=[
        "train model/ --texts pairs.jsonl -o task.shd",
        "train model/ --texts texts.jsonl --sparsity 1% --mask grad -o task.shd",
    ],
)
@click.argument("model")
@options.train_texts
@click.option("-o", "--out", required=True, metavar="FILE", help="The file to write.")
@options.train_sparsity
@options.train_mask
@options.train_targets
@options.scope("Train the share of every tensor, or of the whole model.")
@click.option(
    "--prune-from",
    type=float,
    help="Start with this many times the sparsity, and prune while training; 1 keeps the mask.  [default: 5, but 1 for"
    " masks that cannot be larger and for N:M]",
)
@options.renamed_option("--fall-from", "--prune-from")
@click.option(
    "--magnitude",
    is_flag=True,
    help="Also train a length for each row of a weight, as DoRA does.  [default: only the values at the mask]",
)
@click.option("--avoid", multiple=True, metavar="FILE", help="A .shd file whose weights must not change; repeatable.")
@click.option("--steps", default=400, show_default=True, help="Optimizer steps.")
@options.train_batch
@options.train_relative_lr
@options.renamed_option("--rate", "--relative-lr")
@click.option("--tokens", default=512, show_default=True, help="Longer examples are cut to this many tokens.")
@click.option("--seed", default=0, show_default=True, help="Seed of the order of examples, and of random masks.")
@options.prompt_share
@options.values("int4")
@click.option("--accept-worse", is_flag=True, help="Write the file even if the model is worse than its base with it.")
@click.option(
    "--device",
    help="Where to train; several, such as cuda:0,cuda:1, share out the model's layers.  [default: a GPU, if there is"
    " one; all GPUs where the weights do not fit into one]",
)
@click.option("--plot", help="Draw the losses to this PNG.")
@options.as_json
def train(
    model: str,
    texts: str,
    out: str,
    targets: tuple[str, ...],
    device: str | None,
    plot: str | None,
    as_json: bool,
    accept_worse: bool,
    **settings: Any,
) -> None:
    """Train a sparse adapter for the model in the folder MODEL: a share of its weights changes.

    An example is {"text": ...} for a causal language model, {"prompt": ..., "completion": ...} or {"messages": [...]}
    for a model that answers, encoder-decoders too, {"audio": "FILE.wav", "text": ...} for Whisper,
    {"image": "FILE.png", "prompt": ..., "completion": ...} for a vision-language model, or {"anchor": ...,
    "positive": ...} for an encoder, {"image": "FILE.png", "text": ...} for CLIP, whose embeddings of the two should
    match.

    The same command resumes an interrupted run.
    """
    from shiradelta.train.run import run
    from shiradelta.train.settings import TrainSettings

    with progress_bar("training") as progress:
        report = run(
            Path(model),
            Path(texts),
            Path(out),
            TrainSettings(targets=targets, **settings),
            device=device,
            plot=None if plot is None else Path(plot),
            log=lambda line: echo_lines(line, err=True),
            progress=progress,
            accept_worse=accept_worse,
        )
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(
        f"{report.nnz:,} of {count(report.numel, 'weight')} in {count(report.tensors, 'tensor')} trained,"
        f" {count(report.steps, 'step')} in {report.seconds:.0f} s; loss on"
        f" {count(report.held_out, 'example')} held out: {report.before:.4g} before,"
        f" {report.trained:.4g} after, {report.after:.4g} with the file's values",
        f"{report.out}: {size(report.file_bytes)}; patch it in with: {shlex.join(['shiradelta', 'apply', model, out])}",
    )
