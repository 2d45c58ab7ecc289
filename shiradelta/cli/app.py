"""The group of all commands.  An error ends in one line and exit code 1, wrong usage in exit code 2."""

from __future__ import annotations

import errno
from typing import Any

import click

from shiradelta.cli.apply import apply
from shiradelta.cli.convert import convert
from shiradelta.cli.fuse import fuse
from shiradelta.cli.info import info
from shiradelta.cli.report import report
from shiradelta.cli.revert import revert
from shiradelta.cli.train import train
from shiradelta.cli.verify import verify
from shiradelta.errors import ShiraDeltaError
from shiradelta.util.optional import missing
from shiradelta.util.text import printable


class _Commands(click.Group):
    """Lists commands in the order in which a user meets them, and prints an error of the package as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShiraDeltaError as error:
            click.echo(f"error: {printable(str(error))}", err=True)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "shiradelta"):
                raise
            click.echo(f"error: {missing(package, f'shiradelta {ctx.invoked_subcommand}')}", err=True)
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
        from shiradelta.util.version import version

        click.echo(f"shiradelta, version {version()}")
        context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Sparse weight deltas: small files that patch a model and are taken out again bit for bit."""


for _command in (convert, train, apply, revert, verify, fuse, report, info):
    main.add_command(_command)
