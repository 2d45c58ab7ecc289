"""The group of all commands.  An error ends in one line and exit code 1, wrong usage in exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from shiradelta.cli.output import discard, echo, is_verbose
from shiradelta.errors import ShiraDeltaError, printable
from shiradelta.util.interrupts import terminations_raised
from shiradelta.util.optional import failed_import


class _Modules(Mapping[str, click.Command]):
    """The commands in the order in which a user meets them.

    Each is imported when it is needed, so that `info` starts about as fast as numpy and click can be imported.
    """

    names = (
        "demo",
        "convert",
        "train",
        "apply",
        "revert",
        "verify",
        "list",
        "commit",
        "fuse",
        "recode",
        "report",
        "export",
        "sign",
        "push",
        "chain",
        "info",
        "diff",
    )

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.names:
            raise KeyError(name)
        found: click.Command = getattr(import_module(f"shiradelta.cli.{name}"), name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Commands(click.Group):
    """Lists commands in the order of `_Modules`, and prints an error of the package as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """As click's; a reader of the help that has gone is no error."""
        with _closed_pipes():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminations_raised(), _closed_pipes():
                return super().invoke(ctx)
        except (ShiraDeltaError, ImportError, OSError, MemoryError, KeyboardInterrupt) as error:
            if is_verbose():
                import traceback

                echo("".join(traceback.format_exception(error)), err=True)
            echo(_said(error, str(ctx.invoked_subcommand)), err=True)
        return ctx.exit(1)


def _said(error: BaseException, command: str) -> str:
    """The line for an error."""
    if isinstance(error, ShiraDeltaError):
        return f"error: {error}"
    if isinstance(error, ImportError):
        return f"error: {failed_import(error, f'shiradelta {command}')}"
    if isinstance(error, OSError):
        return f"error: {printable(str(error))}; check the path and its permissions"
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
