"""`shiradelta demo`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines
from shiradelta.errors import TargetError

#: What is shown, in a folder with `model` and `lora`.
STEPS = (
    "convert lora --base model --sparsity 2% -o lora.shd",
    "info lora.shd",
    "apply model lora.shd",
    "verify model",
    "revert model",
    "verify model",
)
_WEIGHTS = "model/model.safetensors"


@command(
    extra="it takes no model; `shiradelta convert` converts yours",
    examples=["demo", "demo --keep tiny"],
)
@click.option("--keep", metavar="FOLDER", help="Make the files in this new folder, and leave them there.")
@options.as_json
@click.pass_context
def demo(context: click.Context, keep: str | None, as_json: bool) -> None:
    """Show how a delta is made, applied, verified and taken out again, in seconds.

    It makes a tiny LLaMA with random weights and a LoRA for it, runs the commands that it prints, and compares the
    model's file before and after.  It needs no network, and nothing but this package.
    """
    import hashlib

    from shiradelta.models.tiny import write_lora, write_model

    with _folder(keep) as folder, chdir(folder):
        write_model(Path("model"))
        write_lora(Path("lora"), "model")
        digests = []
        if not as_json:
            echo_lines("made model (a tiny LLaMA, random weights) and lora (rank 4) from a seed")
        for step in STEPS:
            digests.append(hashlib.sha256(Path(_WEIGHTS).read_bytes()).hexdigest())
            if not as_json:
                echo_lines("", f"$ shiradelta {step}")
            _run(context, shlex.split(step), quiet=as_json)
        digests.append(hashlib.sha256(Path(_WEIGHTS).read_bytes()).hexdigest())
    first, patched, last = digests[0], digests[STEPS.index("verify model")], digests[-1]
    if first != last or first == patched:
        raise TargetError(f"{_WEIGHTS} is not what it was before; this is a fault of shiradelta: report it")
    if as_json:
        echo_json({"folder": keep, "base": first, "patched": patched, "reverted": last})
        return
    echo_lines("", f"sha256 of {_WEIGHTS}: {first[:16]}... base, {patched[:16]}... patched, {last[:16]}... reverted")
    echo_lines("The reverted file is the base, bit for bit.")
    if keep is not None:
        echo_lines(f"The files are in {keep}.")


@contextmanager
def _folder(keep: str | None) -> Iterator[str]:
    """A new folder that stays, or a temporary one.

    Raises:
        TargetError: it is there, or cannot be made.
    """
    if keep is None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="shiradelta-demo-") as folder:
            yield folder
        return
    try:
        Path(keep).mkdir(parents=True)
    except FileExistsError:
        raise TargetError(f"{keep}: is there already; name a new folder") from None
    except OSError as error:
        raise TargetError(f"{keep}: cannot be made ({error.strerror}); name another folder") from None
    yield keep


def _run(context: click.Context, words: list[str], quiet: bool) -> None:
    """Runs a command in this process; one that fails ends the demo with its exit code."""
    group = context.find_root().command
    assert isinstance(group, click.Group)
    name, *arguments = words
    each = group.commands[name]
    with each.make_context(name, [*arguments, *["--quiet"] * quiet], parent=context) as inner:
        try:
            each.invoke(inner)
        except click.exceptions.Exit as end:
            if end.exit_code:
                raise
