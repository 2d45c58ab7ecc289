"""`shiradelta convert`."""

from __future__ import annotations

import os
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import RegistryChoice, RegistryOption, command, renamed_option
from shiradelta.cli.output import (
    DASH,
    echo,
    echo_json,
    echo_lines,
    echo_table,
    echo_text,
    echo_warnings,
    named,
    skipped_lines,
    target,
)
from shiradelta.cli.progress import progress_bar
from shiradelta.errors import printable
from shiradelta.util.text import count, percent, size


def _list_kinds(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from shiradelta.converters import SOURCES, kinds

        echo_table([["kind", "what it reads"], *([kind, SOURCES[kind].help] for kind in kinds()[1:])], left=2)
        context.exit()


def _of_torchrun() -> Any:
    """The group of the processes that torchrun has started; None if it has not, or one process only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
        # Where gloo's threads still run as Python ends, it aborts now and then.
        click.get_current_context().call_on_close(dist.destroy_process_group)
    return dist.group.WORLD


#: Options of what changes are kept, and how; --lossless keeps all.
_CHOICES = (
    "sparsity", "target_", "values", "scope", "kind", "alpha", "skip", "whole", "from_base", "texts", "fit_", "plot",
)  # fmt: skip


@command(
    to_stdout=True,
    extra="give the base model as --base MODEL, and the file to write as -o FILE",
    examples=[
        "convert lora/ --base model/",
        "convert tuned/ --base model/ --sparsity 2% -o style.shd",
        "convert lora/ --base model/ --fit texts.jsonl --plot fit.png",
    ],
)
@click.argument("source")
@click.option("--sparsity", type=options.SHARE, help="Share of the weights that change, such as 1%.  [default: 0.01]")
@click.option("--target-size", metavar="SIZE", help="Largest size of the file, such as 2MB; finds the sparsity.")
@click.option(
    "--target-error", type=options.SHARE, help="Largest relative error of the delta, such as 0.3; finds the sparsity."
)
@click.option(
    "--target-kept",
    type=options.SHARE,
    help="Share of the fine-tune's gain to keep on held-out examples, such as 95%, with --fit; finds the sparsity.",
)
@click.option("--base", metavar="MODEL", help="Folder or file of the base model; required for a full fine-tune.")
@click.option(
    "--from-base",
    metavar="MODEL",
    help="The base that SOURCE was made for, where --base is a new one; with --fit, which makes it work there.",
)
@options.values("int4")
@click.option("-o", "--out", metavar="FILE", help="File to write, - for stdout.  [default: SOURCE with .shd]")
@options.scope("Apply the sparsity to each tensor, or to the whole model.")
@click.option(
    "--kind",
    type=RegistryChoice("shiradelta.converters:kinds"),
    default="auto",
    show_default=True,
    help="What SOURCE is.",
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_kinds, help="List the kinds, and exit."
)
@click.option("--alpha", type=float, help="Alpha of a LoRA, instead of the one in its files.")
@options.skip("Let tensors be missing that cannot be converted")
@click.option(
    "--whole",
    metavar="PATTERN",
    multiple=True,
    help="Store tensors whole that have another shape than the base's: a glob pattern of names.  May be repeated.",
)
@click.option("--zstd", is_flag=True, help="Compress further; switching becomes slower.")
@click.option("--lossless", is_flag=True, help="Everything that differs from the base, bit for bit, with --base.")
@click.option(
    "--context",
    type=RegistryChoice("shiradelta.io.context:CONTEXTS"),
    default="none",
    show_default=True,
    help="What a reader of a lossless file has: with its base the file can be smaller.",
)
@click.option(
    "--fit",
    "texts",
    metavar="FILE[:COLUMN]",
    help=f"Examples on which to fit the changes to how the fine-tune behaves: {options.EXAMPLES}.",
)
@click.option(
    "--fit-method",
    cls=RegistryOption,
    type=RegistryChoice("shiradelta.fit:METHODS"),
    default="train",
    show_default=True,
    help="How values are fitted",
)
@click.option(
    "--fit-mask",
    cls=RegistryOption,
    type=RegistryChoice("shiradelta.fit:MASKS", "shiradelta.fit.choices:RENAMED_MASKS"),
    help="Which weights change; without it refit, or prune where that would leave much",
)
@click.option("--fit-steps", type=int, help="Training steps.  [default: 1,000; on a CPU what ten minutes hold]")
@click.option("--fit-batch", default=128, show_default=True, help="Examples per step.")
@click.option("--fit-micro", type=int, help="Examples per forward pass; fewer take less memory.")
@click.option(
    "--fit-relative-lr",
    type=float,
    help="Learning rate, relative to the size of a nonzero.  [default: the mask's, 0.03 for refit, 0.3 for others]",
)
@renamed_option("--fit-rate", "--fit-relative-lr")
@click.option("--fit-tokens", default=512, show_default=True, help="Where texts are cut.")
@click.option(
    "--fit-text-share",
    type=options.SHARE,
    default=0.1,
    show_default=True,
    help="Share of a language model's target that is the text's next token; the fine-tune predicts the rest.",
)
@click.option(
    "--fit-generate",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Texts to fit on beside the examples, which a fine-tuned language model generates from their prompts.",
)
@options.prompt_share
@click.option(
    "--accept-worse",
    is_flag=True,
    help="Exit with 0 even if the fit is worse than the base or than top-k.",
)
@click.option(
    "--device",
    help="Where to fit; several, such as cuda:0,cuda:1, share out the model's layers.  [default: a GPU, if there is"
    " one; all GPUs where the weights do not fit into one]",
)
@click.option("--plot", metavar="FILE", help="Plot where the changes lie, and the fit, to this PNG.")
@options.as_json
def convert(as_json: bool, texts: str | None, device: str | None, accept_worse: bool, **arguments: Any) -> None:
    """Convert a LoRA, a full fine-tune or a diff to a .shd file.

    SOURCE is a file (safetensors, or torch's .bin, .pt, .ckpt) or a folder (PEFT adapter, fine-tuned model).
    """
    from shiradelta.converters import convert as run
    from shiradelta.fit import METHODS, Fit
    from shiradelta.format.registry import SUFFIX

    settings = {key.removeprefix("fit_"): arguments.pop(key) for key in list(arguments) if key.startswith("fit_")}
    settings["prompt_share"] = arguments.pop("prompt_share")
    if texts is None and (given := options.given("fit_", "prompt_share", "accept_worse", "device")):
        raise click.UsageError(f"{given} is only for fitting; give --fit TEXTS, too.")
    if not METHODS.find(settings["method"]).trains and (
        given := options.given("fit_mask", "fit_steps", "fit_relative_lr", "fit_text_share")
    ):
        raise click.UsageError(f"{given} is only for training; leave it out, or --fit-method {settings['method']}.")
    if arguments["lossless"] and (given := options.given(*_CHOICES)):
        raise click.UsageError(f"{given} is for a choice of changes; --lossless keeps all as they are.")
    if arguments["lossless"] and arguments["base"] is None:
        raise click.UsageError("--lossless compares with the checkpoint before SOURCE; give --base MODEL.")
    fit = texts and Fit(texts, **settings, device=device, log=lambda line: echo_lines(line, err=True))
    if not arguments["lossless"] and options.given("context"):
        raise click.UsageError("--context is for --lossless; `shiradelta recode` makes other files smaller.")
    out = arguments.pop("out")
    group = _of_torchrun()
    if group is not None and out == DASH:
        raise click.UsageError("-o - is for one process; name a file that the first process of torchrun can write.")
    with target(out, SUFFIX) as path, progress_bar("fitting" if fit else "converting") as progress:
        report = run(**arguments, out=path, fit=fit or None, group=group, progress=progress)
    if group is not None and group.rank():
        return  # the first process says it for all
    report.out = report.out if path == out else DASH
    code = 1 if report.worse is not None and not accept_worse else 0
    if as_json:
        echo_json(report.as_dict())
        click.get_current_context().exit(code)
    if report.worse is not None:
        echo(printable(f"worse: {report.worse}; --accept-worse exits with 0 all the same"), err=True)
    echo_table(report.rows)
    for line in skipped_lines(report.skipped):
        echo_text(line)
    echo_warnings(line for line in report.warnings if line != report.worse)
    if report.fit is not None:
        for rows in filter(None, (report.trials, report.losses, report.measures, report.apart)):
            echo_text("")
            echo_table(rows)
        echo_text("")
    changed = sum(t.nnz for t in report.tensors if not t.operation.creates)
    echo_lines(
        f"{count(report.tensors, 'tensor')} converted, {len(report.skipped)} skipped; {changed:,} of"
        f" {count(report.numel, 'weight')} changed ({percent(changed / max(report.numel, 1))}); {report.summary}",
        f"{named(report.out, 'stdout')}: {size(report.file_bytes)}, {report.bits_per_nonzero:.2f} bits per nonzero",
    )
    click.get_current_context().exit(code)
