"""The group of all commands.  An error ends in one line and exit code 1, wrong usage and arguments in exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from shiradelta.cli.output import discard, echo, is_verbose
from shiradelta.errors import ArgumentError, ShiraDeltaError, printable
from shiradelta.util.interrupts import terminations_raised
from shiradelta.util.optional import failed_import

#: What each command does in a line, in the order in which a user meets them.
_DOES = {
    "demo": "Show convert, apply, verify and revert on a tiny model.",
    "convert": "Convert a LoRA, a full fine-tune or a diff to a .shd file.",
    "train": "Train a sparse adapter.",
    "apply": "Patch a delta into a model's folder.",
    "revert": "Take the last delta out of a model's folder, bit for bit.",
    "verify": "Check whether a model's folder is base, patched or neither, or a signature.",
    "list": "Show which deltas are on a model's folder.",
    "commit": "Make the present weights of a model's folder its base.",
    "fuse": "Fuse several deltas into one.",
    "recode": "Make a .shd file smaller for where its base is, or plain again.",
    "report": "Report what deltas hold and how they interfere.",
    "export": "Write a delta in the layout of another library.",
    "sign": "Sign a .shd file.",
    "push": "Upload a .shd file and its model card to the Hugging Face Hub.",
    "experts": "Train families of deltas, and route prompts to them.",
    "chain": "Publish the steps of a training run, fold and follow them.",
    "info": "Show what is in a .shd file; - reads it from stdin.",
    "diff": "Compare two .shd files.",
}


class _Modules(Mapping[str, click.Command]):
    """The commands.  Each is imported when it is needed, so that none has to wait for the others."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in _DOES:
            raise KeyError(name)
        found: click.Command = getattr(import_module(f"shiradelta.cli.{name}"), name)
        found.short_help = _DOES[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_DOES)

    def __len__(self) -> int:
        return len(_DOES)


class _Commands(click.Group):
    """Lists commands in the order of `_DOES`, and prints an error of the package as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_DOES.items()))

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """As click's; a reader of the help that has gone is no error."""
        with _closed_pipes():
            return super().make_context(*args, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; of an option that is not the group's it is said where it belongs."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.possibilities:
                raise
            said = f"No such option {error.option_name!r}; give a command's options after the command."
            raise click.NoSuchOption(error.option_name, said, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        from shiradelta.util.threads import share_processors  # which a help does without

        share_processors()
        try:
            with terminations_raised(), _closed_pipes():
                return super().invoke(ctx)
        except (ShiraDeltaError, ImportError, OSError, MemoryError, KeyboardInterrupt) as error:
            if is_verbose():
                import traceback

                echo("".join(traceback.format_exception(error)), err=True)
            echo(_said(error, str(ctx.invoked_subcommand)), err=True)
            code = click.UsageError.exit_code if isinstance(error, ArgumentError) else 1
        return ctx.exit(code)


def _said(error: BaseException, command: str) -> str:
    """The line for an error."""
    if isinstance(error, ShiraDeltaError):
        return f"error: {error}"
    if isinstance(error, ImportError):
        return f"error: {failed_import(error, f'shiradelta {command}')}"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there" if full else "check the path and its permissions"
        return f"error: {printable(str(error))}; {remedy}"
    if isinstance(error, MemoryError):
        return "error: out of memory; close other programs, or use a machine with more memory"
    return "interrupted; every file is whole, as before the command or as after it"


@contextmanager
def _closed_pipes() -> Iterator[None]:
    """Ends the command well where click prints a help that no one reads.  Other output goes through `echo`."""
    try:
        yield
    except BrokenPipeError:
        discard(sys.stdout)
        raise click.exceptions.Exit(0) from None


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from shiradelta.util.version import VERSION

        click.echo(f"shiradelta, version {VERSION}")
        context.exit()


@click.group(
    cls=_Commands,
    commands=_Modules(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Sparse weight deltas: small files that patch a model and are taken out again bit for bit."""
