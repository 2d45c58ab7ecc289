"""`shiradelta experts` and its commands."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import Command, Group
from shiradelta.cli.output import echo_json, echo_lines, echo_table, echo_warnings
from shiradelta.cli.progress import progress_bar
from shiradelta.errors import ArgumentError
from shiradelta.util.text import count, size

#: Longer prompts are cut in tables.
_SHOWN = 40


@click.group(
    cls=Group,
    short_help="Train families of deltas, and route prompts to them.",
    examples=[
        "experts train model/ --texts pairs.jsonl -o family/",
        'experts route model/ family/ "Define the word: delta"',
    ],
)
def experts() -> None:
    """A family is a folder: a base delta, and an expert delta for each cluster of examples (after ELREA).

    A prompt's route says how much each expert counts; their weight average is one delta.
    """


tokens = click.option("--tokens", default=512, show_default=True, help="Longer texts are cut to this many tokens.")
device = click.option("--device", help="Where the model runs.  [default: a GPU, if there is one]")


@experts.command(
    cls=Command,
    short_help="Train a family.",
    extra="give the examples as --texts FILE, and the folder to make as -o FOLDER",
    examples=[
        "experts train model/ --texts pairs.jsonl -o family/",
        "experts train model/ --texts pairs.jsonl --experts 8 --longer one.shd -o family/",
    ],
)
@click.argument("model")
@options.train_texts
@click.option("-o", "--out", required=True, metavar="FOLDER", help="The folder to make.")
@click.option("--experts", "members", default=4, show_default=True, help="Number of experts.")
@options.train_sparsity
@options.train_mask
@options.train_targets
@click.option("--steps", default=400, show_default=True, help="Optimizer steps of the base delta.")
@click.option(
    "--expert-steps", type=int, help="Steps of each expert.  [default: it sees its examples as often as the base delta]"
)
@options.train_batch
@options.train_relative_lr
@tokens
@click.option("--seed", default=0, show_default=True, help="Seed of the order of examples, masks and the projection.")
@options.values("int4")
@click.option("--dims", type=click.IntRange(1), default=8192, show_default=True, help="Dimensions that route prompts.")
@click.option(
    "--longer", metavar="FILE", help="Also train one delta for as many steps as the whole family, and compare with it."
)
@click.option("--accept-worse", is_flag=True, help="Write the family even if it is worse than the base model.")
@device
@options.as_json
def train(
    model: str,
    texts: str,
    out: str,
    members: int,
    targets: tuple[str, ...],
    expert_steps: int | None,
    dims: int,
    longer: str | None,
    accept_worse: bool,
    device: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a base delta on all examples, then an expert on each cluster of them.

    An example is {"prompt": ..., "completion": ...}, and the prompt alone decides its cluster; or {"text": ...}.
    Held-out examples say whether the family is better than the base delta by itself; if not, that is said first.

    The same command resumes an interrupted run.
    """
    from shiradelta.experts.run import run_family
    from shiradelta.train.settings import TrainSettings

    with progress_bar("training") as progress:
        report = run_family(
            Path(model),
            Path(texts),
            Path(out),
            TrainSettings(targets=targets, **settings),
            experts=members,
            expert_steps=expert_steps,
            dims=dims,
            longer=None if longer is None else Path(longer),
            device=device,
            log=lambda line: echo_lines(line, err=True),
            progress=progress,
            accept_worse=accept_worse,
        )
    warning = report.warning
    if as_json:
        echo_json(dataclasses.asdict(report) | {"warning": warning})
        return
    if warning is not None:
        echo_warnings([warning])
    measured = [["base model", f"{report.before:.4g}"], ["base delta alone", f"{report.one_delta:.4g}"]]
    if report.longer is not None:
        measured.append(["one delta trained as long", f"{report.longer:.4g}"])
    measured.append(["family, each group of prompts by its route", f"{report.after:.4g}"])
    echo_table([[f"loss on {count(report.held_out, 'example')} held out", ""], *measured])
    shares = ", ".join(f"{name} of {number:,}" for name, number in report.experts.items())
    echo_lines(
        f"{report.out}: {size(report.bytes)}, {report.nnz:,} nonzeros a member, trained on {report.examples:,} examples"
        f" ({shares}), {count(report.steps, 'step')} in {report.seconds:.0f} s",
        f"route a prompt with: {shlex.join(['shiradelta', 'experts', 'route', model, out, 'PROMPT'])}",
    )


@experts.command(
    cls=Command,
    short_help="Make a family of deltas that exist.",
    examples=[
        "experts assemble model/ base.shd a.shd b.shd --texts a.jsonl --texts b.jsonl -o family/",
    ],
)
@click.argument("model")
@click.argument("base", metavar="BASE")
@click.argument("deltas", nargs=-1, required=True, metavar="EXPERT...")
@click.option(
    "--texts",
    "files",
    multiple=True,
    required=True,
    metavar="FILE[:COLUMN]",
    help="Examples of an expert's prompts; once for each expert, in the same order.",
)
@click.option("-o", "--out", required=True, metavar="FOLDER", help="The folder to make.")
@click.option("--dims", type=click.IntRange(1), default=8192, show_default=True, help="Dimensions that route prompts.")
@click.option("--seed", default=0, show_default=True, help="Seed of the projection.")
@tokens
@device
@options.as_json
def assemble(
    model: str,
    base: str,
    deltas: tuple[str, ...],
    files: tuple[str, ...],
    out: str,
    dims: int,
    seed: int,
    tokens: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Make a family of the base delta BASE and experts, .shd files that are deltas from the folder MODEL.

    LoRAs, such as those of ELREA, become deltas with `shiradelta convert`.
    """
    from shiradelta.experts import assemble_family
    from shiradelta.experts.live import TOGETHER, open_live
    from shiradelta.text.read import read_file

    if len(files) != len(deltas):
        raise ArgumentError(
            f"{count(len(deltas), 'expert')} and {count(len(files), 'file')} of examples do not match; give --texts"
            " once for each expert, in the same order"
        )
    examples = [read_file(file, least=1).plain for file in files]
    groups = [number for number, some in enumerate(examples) for _ in some]
    with progress_bar("assembling") as progress:
        live = open_live(Path(model), tokens, device)
        every = [one for some in examples for one in some]
        family = assemble_family(
            live.model, base, deltas, every, groups, live.prompt_loss, out, dims=dims, seed=seed, prompt_batch=TOGETHER,
            progress=progress,
        )  # fmt: skip
    if as_json:
        echo_json({"out": out, "experts": dict(zip(family.experts, family.examples, strict=True))})
        return
    echo_lines(f"{out}: {count(len(family.experts), 'expert')}, routed by {count(len(every), 'example')}")


@experts.command(
    cls=Command,
    short_help="Say how much each expert counts for prompts.",
    extra="put a prompt with spaces into quotes, or give a file as --texts",
    examples=[
        'experts route model/ family/ "Define the word: delta"',
        "experts route model/ family/ --texts prompts.jsonl --json",
        'experts route model/ family/ "Define the word: delta" -o average.shd',
    ],
)
@click.argument("model")
@click.argument("family")
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--texts", metavar="FILE[:COLUMN]", help="Prompts from a file: texts, or examples with a prompt.")
@click.option("-o", "--out", metavar="FILE", help="Write the weight average for all these prompts together as a delta.")
@tokens
@device
@options.as_json
def route(
    model: str,
    family: str,
    prompts: tuple[str, ...],
    texts: str | None,
    out: str | None,
    tokens: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Say how much each expert of FAMILY counts for prompts, with the folder MODEL as the base model.

    With several prompts, `together` is the route of all as one group.
    """
    from shiradelta.experts import open_family
    from shiradelta.experts.live import check_average, open_live, write_average

    if bool(prompts) == (texts is not None):
        raise ArgumentError("give prompts, or --texts FILE, one of the two")
    some: list[Any] = list(prompts)
    if texts is not None:
        from shiradelta.text.read import read_file

        some = read_file(texts, least=1).plain
    opened = open_family(family)
    if out is not None:
        check_average(opened, out)
    with progress_bar("routing") as progress:
        routes, together = open_live(Path(model), tokens, device).routes(opened, some, progress)
        if out is not None:
            write_average(opened, together, out)
    shown = [one if isinstance(one, str) else one["prompt"] for one in some]
    if as_json:
        found = [{"prompt": prompt, "strengths": one} for prompt, one in zip(shown, routes, strict=True)]
        echo_json({"prompts": found, "together": together, "out": out})
        return
    rows = [[_cut(prompt), *map(_strength, one.values())] for prompt, one in zip(shown, routes, strict=True)]
    if len(rows) > 1:
        rows.append(["together", *map(_strength, together.values())])
    echo_table([["prompt", *opened.experts], *rows])
    if out is not None:
        echo_lines(f"{out}: the average; patch it in with: {shlex.join(['shiradelta', 'apply', model, out])}")


def _strength(value: float) -> str:
    return f"{value:.3f}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


@experts.command(cls=Command, short_help="Show what is in a family.", examples=["experts info family/"])
@click.argument("family")
@options.as_json
def info(family: str, as_json: bool) -> None:
    """Show the members of FAMILY, and check every file of it."""
    from shiradelta.experts import open_family
    from shiradelta.io.reader import open_delta

    opened = open_family(family)
    members: list[dict[str, Any]] = []
    for name, examples in zip(opened.digests, (sum(opened.examples), *opened.examples), strict=True):
        with open_delta(opened.path(name)) as delta:
            nnz, tensors = sum(tensor.nnz for tensor in delta.values()), len(delta)
        file = opened.path(name).stat().st_size
        members.append({"name": name, "examples": examples, "tensors": tensors, "nonzeros": nnz, "bytes": file})
    if as_json:
        echo_json({"dims": opened.centroids.shape[1], "seed": opened.seed, "members": members})
        return
    rows: list[list[str]] = [
        [each["name"], f"{each['examples']:,}", f"{each['tensors']:,}", f"{each['nonzeros']:,}", size(each["bytes"])]
        for each in members
    ]
    echo_table([["", "examples", "tensors", "nonzeros", "bytes"], *rows])
    echo_lines(f"{family}: every file is whole; prompts are routed by {opened.centroids.shape[1]:,} dimensions")
