"""The group of all commands.  An error ends in one line and exit code 1, wrong usage in exit code 2."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

from shiradelta.errors import ShiraDeltaError, printable
from shiradelta.util.interrupts import terminations_raised
from shiradelta.util.optional import failed_import


class _Modules(Mapping[str, click.Command]):
    """The commands in the order in which a user meets them.

    Each is imported when it is needed, so that `info` starts about as fast as numpy and click can be imported.
    """

    names = (
        "convert",
        "train",
        "apply",
        "revert",
        "verify",
        "list",
        "commit",
        "fuse",
        "report",
        "export",
        "sign",
        "info",
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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminations_raised():
                return super().invoke(ctx)
        except ShiraDeltaError as error:
            click.echo(f"error: {error}", err=True)
        except ImportError as error:
            problem = failed_import(error, f"shiradelta {ctx.invoked_subcommand}")
            click.echo(f"error: {problem}", err=True)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has gone; click exits silently
                raise
            click.echo(f"error: {printable(str(error))}; check the path and its permissions", err=True)
        except MemoryError:
            click.echo("error: out of memory; close other programs, or use a machine with more memory", err=True)
        except KeyboardInterrupt:
            click.echo("interrupted; every file is whole, as before the command or as after it", err=True)
        return ctx.exit(1)


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
