"""The command line: options, tables and exit codes; the work is done elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from shiradelta.errors import ShiraDeltaError
from shiradelta.format.registry import VALUE_CODEC_OF_NAME
from shiradelta.util import show

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def _values(default: str) -> Callable[[Any], Any]:
    """The option that names a codec of values."""
    choice = click.Choice(list(VALUE_CODEC_OF_NAME))
    return click.option("--values", type=choice, default=default, show_default=True, help="How the changes are stored.")


class _Commands(click.Group):
    """Commands in the order in which a user meets them; errors of the package become one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShiraDeltaError as error:
            click.echo(f"error: {show.printable(str(error))}", err=True)
        except OSError as error:
            click.echo(f"error: {show.printable(str(error))}; check the path and its permissions", err=True)
        except MemoryError:
            click.echo("error: out of memory; close other programs, or use a machine with more", err=True)
        except KeyboardInterrupt:
            click.echo("interrupted; every file is whole, as it was before or as after", err=True)
        return ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shiradelta")
def main() -> None:
    """Sparse weight deltas: small files that are patched into a model and taken out again bit for bit."""


def _given(*starts: str) -> str:
    """The first option on the command line of those that start so, or nothing."""
    context = click.get_current_context()
    given = (
        option.opts[0]
        for option in context.command.params
        if str(option.name).startswith(starts)
        and context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    )
    return next(given, "")


def _skipped(skipped: Mapping[str, str]) -> list[str]:
    """A line for each tensor that was skipped, or for each reason that many share."""
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(show.printable(name))
    return [
        f"skipped {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {show.printable(why)}"
        for why, names in by_reason.items()
    ]


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


@main.command(short_help="A LoRA, a full fine-tune or a diff to a .shd file.")
@click.argument("source")
@click.option("--sparsity", type=float, help="The share of the weights that change.  [default: 0.01]")
@click.option(
    "--target-size", metavar="SIZE", help="Instead: as many weights as a file of at most this size holds, such as 2MB."
)
@click.option(
    "--target-error", type=float, help="Instead: as few weights as keep the relative error of the delta, such as 0.3."
)
@click.option("--base", metavar="MODEL", help="The base model's folder or file; a full fine-tune needs it.")
@_values("int4")
@click.option("-o", "--out", metavar="FILE", help="The file to write.  [default: SOURCE with .shd]")
@click.option(
    "--scope",
    type=click.Choice(["tensor", "model"]),
    default="tensor",
    show_default=True,
    help="Keep the share in every tensor, or over the whole model.",
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "lora", "full", "diff"]),
    default="auto",
    show_default=True,
    help="What SOURCE is.",
)
@click.option("--alpha", type=float, help="A LoRA's alpha, over what its files say.")
@click.option("--zstd", is_flag=True, help="Compress further; slower to swap.")
@click.option(
    "--fit",
    "texts",
    metavar="FILE",
    help="Texts on which to fit the changes to how the fine-tune behaves: JSON Lines, key text.",
)
@click.option(
    "--fit-method",
    type=click.Choice(["train", "refit"]),
    default="train",
    show_default=True,
    help="By gradients, or in closed form from forward passes alone.",
)
@click.option(
    "--fit-mask",
    type=click.Choice(["falling", "magnitude", "activation", "gradient"]),
    default="falling",
    show_default=True,
    help="Which weights change: found while training, or by change, change x input, change x gradient.",
)
@click.option("--fit-steps", type=int, help="Training steps.  [default: 1,000; on a CPU what ten minutes hold]")
@click.option("--fit-batch", default=128, show_default=True, help="Texts a step.")
@click.option("--fit-micro", type=int, help="Texts a forward pass, if fewer: takes less memory.")
@click.option("--fit-rate", default=0.3, show_default=True, help="Learning rate, as a share of a nonzero's size.")
@click.option("--fit-tokens", default=128, show_default=True, help="Where texts are cut.")
@click.option(
    "--fit-text-share",
    default=0.1,
    show_default=True,
    help="Of a language model's target, the share that is the text's next token; the fine-tune says the rest.",
)
@click.option("--device", help="Where to fit.  [default: a GPU, if there is one]")
@click.option("--plot", metavar="FILE", help="Draw where the changes lie, and the fit, to this PNG.")
@_JSON
def convert(as_json: bool, texts: str | None, device: str | None, **arguments: Any) -> None:
    """Convert a LoRA, a full fine-tune or a diff to a .shd file.

    SOURCE is a safetensors file or a folder (PEFT adapter, fine-tuned model).
    """
    from shiradelta.converters import convert as run
    from shiradelta.fit import Fit

    settings = {key.removeprefix("fit_"): arguments.pop(key) for key in list(arguments) if key.startswith("fit_")}
    if texts is None and (given := _given("fit_", "device")):
        raise click.UsageError(f"{given} is of fitting; give --fit TEXTS, too.")
    if settings["method"] == "refit" and (given := _given("fit_mask", "fit_steps", "fit_rate", "fit_text_share")):
        raise click.UsageError(f"{given} is of training; leave it out, or --fit-method refit.")
    fit = texts and Fit(texts, **settings, device=device, say=lambda line: click.echo(line, err=True))
    with show.progress("fitting" if fit else "converting") as progress:
        report = run(**arguments, fit=fit or None, progress=progress)
    if as_json:
        _echo_json(report.as_dict())
        return
    click.echo(show.table(report.rows))
    for line in _skipped(report.skipped):
        click.echo(line)
    for warning in report.warnings:
        click.echo(f"warning: {show.printable(warning)}", err=True)
    if report.fit is not None:
        click.echo(f"\n{show.table(report.measures)}\n")
    changed = sum(t.nnz for t in report.tensors if t.op != "new")
    click.echo(
        f"{len(report.tensors)} tensors converted, {len(report.skipped)} skipped; {changed:,} of {report.numel:,}"
        f" weights change ({show.percent(changed / max(report.numel, 1))}); {report.summary}\n"
        f"{report.out}: {show.size(report.file_bytes)}, {report.bits_per_nonzero:.2f} bits per nonzero"
    )


@main.command(short_help="Train a sparse adapter.")
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
@click.option(
    "--scope",
    type=click.Choice(["tensor", "model"]),
    default="tensor",
    show_default=True,
    help="Train the share of every tensor, or of all of them together.",
)
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
@_values("int4")
@click.option("--device", help="Where to train.  [default: a GPU, if there is one]")
@click.option("--plot", help="Draw the losses to this PNG.")
@_JSON
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
    with show.progress("training") as progress:
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
        _echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.nnz:,} of {report.numel:,} weights in {report.tensors} tensors trained, {report.steps} steps in"
        f" {report.seconds:.0f} s; loss on {report.held_out} examples held out: {report.before:.4g} before,"
        f" {report.trained:.4g} after, {report.after:.4g} with the file's values\n"
        f"{report.out}: {show.size(report.file_bytes)}; patch it in with: shiradelta apply {model} {report.out}"
    )


@main.command(short_help="Patch a delta into a model's folder.")
@click.argument("model")
@click.argument("delta")
@click.option("--strength", default=1.0, show_default=True, help="What the changes are multiplied with.")
@click.option("-o", "--out", help="Write a patched copy to this folder; MODEL stays as it is.")
@click.option("--no-check", is_flag=True, help="Apply it to a base other than the one it was made against.")
@click.option("--allow-dtype", is_flag=True, help="Apply it to a base stored in another dtype; not checked then.")
@_JSON
def apply(
    model: str, delta: str, strength: float, out: str | None, no_check: bool, allow_dtype: bool, as_json: bool
) -> None:
    """Patch DELTA into the weights of the folder MODEL, so that it can be taken out again exactly."""
    from shiradelta.folder import apply as directory

    with show.progress("applying") as progress:
        report = directory.apply(
            model,
            delta,
            out=out,
            strength=strength,
            check=not no_check,
            allow_dtype=allow_dtype,
            progress=progress,
        )
    if as_json:
        _echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.folder}: {report.tensors} tensors patched, {report.changed:,} of {report.nonzeros:,} listed weights"
        f" differ now"
        + (f", {report.added} tensors added" if report.added else "")
        + (f", {report.dropped} taken away" if report.dropped else "")
    )
    for warning in report.warnings:
        click.echo(f"warning: {show.printable(warning)}", err=True)
    click.echo(f"take it out again with: shiradelta revert {report.folder}")


@main.command(short_help="Take the last delta out again, bit for bit.")
@click.argument("model")
@click.option("--force", is_flag=True, help="Put the originals back even if the weights were changed since.")
@_JSON
def revert(model: str, force: bool, as_json: bool) -> None:
    """Take the last delta out of the folder MODEL, bit for bit; an interrupted action is rolled back instead."""
    from shiradelta.folder import apply as directory

    with show.progress("reverting") as progress:
        report = directory.revert(model, force, progress)
    if as_json:
        _echo_json(dataclasses.asdict(report))
        return
    did = "rolled back the interrupted action on" if report.interrupted else "took out"
    rest = f"{report.left} more applied" if report.left else "the folder is its base again"
    click.echo(f"{model}: {did} {show.printable(report.delta.file)}, bit for bit; {rest}")


@main.command(short_help="Say whether a folder is base, patched or neither.")
@click.argument("model")
@click.argument("delta", required=False)
@_JSON
def verify(model: str, delta: str | None, as_json: bool) -> None:
    """Say whether the folder MODEL is exactly its base, exactly patched, or neither (exit code 1).

    Looked at are the weights that deltas change: others are not known to them.

    With DELTA, a folder on which nothing was applied is compared with that file's fingerprints.
    """
    from shiradelta.folder.verification import verify as run

    report = run(model, delta)
    if as_json:
        _echo_json(dataclasses.asdict(report))
    else:
        if report.recovered:
            click.echo(f"{model}: an interrupted action was rolled back")
        click.echo(f"{model}: {report.state}: {show.printable(report.detail)}")
    if report.state == "neither":
        sys.exit(1)


@main.command(short_help="Several deltas into one.")
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", required=True, help="The file to write.")
@click.option(
    "--method",
    type=click.Choice(["sum", "mean", "max", "ties", "disjoint", "dare", "della"]),
    default="sum",
    show_default=True,
    help="How shared weights are settled; sum is what applying them together does.",
)
@_values("f32")
@click.option("--drop", default=0.5, show_default=True, help="The share that dare and della drop.")
@click.option("--seed", default=0, show_default=True, help="Of dare and della.")
@click.option("--base", metavar="MODEL", help="The base model, for fingerprints in the result.")
@_JSON
def fuse(deltas: tuple[str, ...], as_json: bool, **arguments: Any) -> None:
    """Fuse .shd files into one, without a model: style.shd:0.7 task.shd:1.0."""
    from shiradelta.combine.fuse import fuse as run

    if arguments["method"] not in ("dare", "della") and (given := _given("drop", "seed")):
        raise click.UsageError(f"{given} is of dare and della; give --method, too.")
    with show.progress("fusing") as progress:
        report = run(_with_strengths(deltas), **arguments, progress=progress)
    if as_json:
        _echo_json(dataclasses.asdict(report))
        return
    click.echo(
        f"{report.out}: {report.tensors} tensors, {report.nnz:,} nonzeros of {report.input_nnz:,} in the inputs\n"
        f"{report.shared:,} of them ({show.percent(report.shared / max(report.nnz, 1))}) are touched by several inputs,"
        f" {show.percent(report.conflicts / max(report.shared, 1))} of these in opposite directions;"
        " `shiradelta report` tells more"
    )


@main.command(short_help="What deltas hold, and how they interfere.")
@click.argument("deltas", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@click.option("-o", "--out", metavar="FILE", help="Write it all as one HTML file, which needs no network.")
@click.option("--png", metavar="FILE", help="Write the heat map, layers by pairs, as a picture.")
@_JSON
def report(deltas: tuple[str, ...], out: str | None, png: str | None, as_json: bool) -> None:
    """Say what is in .shd files and how much every two of them get in each other's way, before they are fused."""
    from shiradelta.combine.report import report as run
    from shiradelta.combine.report.text import summary

    with show.progress("comparing") as progress:
        made = run(_with_strengths(deltas), out=out, png=png, progress=progress)
    if as_json:
        _echo_json(made.as_dict())
        return
    click.echo(summary(made))
    for warning in made.interference.warnings:
        click.echo(f"warning: {show.printable(warning)}", err=True)
    for written in filter(None, (out, png)):
        click.echo(f"{written}: written, {show.size(os.path.getsize(written))}")


def _with_strengths(arguments: Sequence[str]) -> dict[str | os.PathLike[str], float]:
    found: dict[str | os.PathLike[str], float] = dict(map(_with_strength, arguments))
    if len(found) < len(arguments):
        raise ShiraDeltaError("a file is given twice; give it once, with one strength")
    return found


def _with_strength(argument: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a colon that no number follows belongs to the name."""
    name, colon, strength = argument.rpartition(":")
    try:
        return (name, float(strength)) if colon else (argument, 1.0)
    except ValueError:
        return argument, 1.0


@main.command()
@click.argument("file", required=False)
@click.option("--system", is_flag=True, help="Show what this installation computes with instead, and why.")
@click.option("--verify", "full", is_flag=True, help="Decode everything and check the content digest too.")
@_JSON
def info(file: str | None, system: bool, full: bool, as_json: bool) -> None:
    """Show what is in a .shd file."""
    if system:
        from shiradelta.backends.libshd import describe as describe_system

        found = describe_system()
        if as_json:
            _echo_json(found)
        else:
            click.echo("\n".join(f"{key:>8}: {value}" for key, value in found.items()))
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    from shiradelta.io.describe import describe, summary
    from shiradelta.io.reader import open_delta

    with open_delta(file) as delta:
        if full:
            delta.verify()
        about = describe(delta)
    if as_json:
        _echo_json(about)
        return
    checked = "checked in full" if full else "tables checked; --verify checks everything"
    click.echo(f"{summary(about)}; {checked}\ndigest {about['digest']}")
