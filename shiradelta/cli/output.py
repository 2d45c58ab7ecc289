"""Prints what commands have in common: JSON, tables, warnings.  Nothing else in the package prints, or reads stdin.

Work is not undone by a reader that has gone: what is printed to a closed pipe is dropped, and the exit code is that of
the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from shiradelta.errors import ArgumentError, FormatError, printable
from shiradelta.util.text import table

if TYPE_CHECKING:
    from shiradelta.io.reader import Delta

#: Where the context keeps how much is said: -1 with --quiet, 1 with --verbose.
_VERBOSITY = "shiradelta.verbosity"


#: Where the context keeps that stdout takes a file.
_TAKEN = "shiradelta.stdout"
#: The argument that stands for stdin or stdout.
DASH = "-"


@contextmanager
def target(out: str | None, suffix: str) -> Iterator[str | None]:
    """The path to write; for `-` a temporary file, which goes to stdout in the end, and all that is said to stderr.

    Raises:
        ArgumentError: stdout is a terminal.
    """
    if out != DASH:
        yield out
        return
    if why := _unfit(sys.stdout):
        raise ArgumentError(f"-o -: stdout is {why}; name a file, or redirect the output (> FILE)")
    click.get_current_context().meta[_TAKEN] = True
    import shutil
    import tempfile  # both take longer to import than the rest of the command line's own modules

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"stdout{suffix}")
        yield path
        stdout = sys.stdout.buffer
        with open(path, "rb") as stream:
            shutil.copyfileobj(stream, stdout)
        stdout.flush()


def _unfit(stream: TextIO | None) -> str:
    """Why a stream is none for a file's bytes; empty if it is one.  Python has None for a stream that is closed."""
    return "closed" if stream is None else "a terminal" if stream.isatty() else ""


def named(path: str, stream: str = "stdin") -> str:
    """What an input, or with "stdout" an output, is called in what is said."""
    return stream if path == DASH else path


def open_named(path: str, limit: str | None) -> Delta:
    """The delta in a file; for `-` the one on stdin.

    Raises:
        ArgumentError: stdin is a terminal.
        FormatError: the delta is refused.
    """
    from shiradelta.io.reader import open_delta

    if path != DASH:
        return open_delta(path, limit=limit)
    if why := _unfit(sys.stdin):
        raise ArgumentError(f"-: stdin is {why}; name a file, or redirect the input (< FILE)")
    try:
        return open_delta(sys.stdin.buffer, limit=limit)
    except FormatError as error:
        error.file = "stdin"
        raise


@contextmanager
def delta_from(path: str, limit: str | None) -> Iterator[str | Delta]:
    """The path of a delta; for `-` the delta on stdin, as `open_named` gives it."""
    if path != DASH:
        yield path
    else:
        with open_named(path, limit) as delta:
            yield delta


def set_verbosity(context: click.Context, verbosity: int) -> None:
    """Records how much a command says."""
    context.meta[_VERBOSITY] = verbosity


def is_quiet() -> bool:
    """Whether only errors, warnings and JSON are printed."""
    return _verbosity() < 0


def is_verbose() -> bool:
    """Whether tracebacks and the cost of a command are printed, too."""
    return _verbosity() > 0


def _verbosity() -> int:
    context = click.get_current_context(silent=True)
    return 0 if context is None else context.meta.get(_VERBOSITY, 0)


def echo(text: str, err: bool = False) -> None:
    """Prints a text, which is escaped already, whatever the verbosity."""
    context = click.get_current_context(silent=True)
    err = err or bool(context and context.meta.get(_TAKEN))
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        discard(sys.stderr if err else sys.stdout)
    except OSError as error:
        error.filename = error.filename or ("stderr" if err else "stdout")
        raise


def discard(stream: TextIO) -> None:
    """Sends whatever else is written to a stream to nowhere: its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def echo_json(value: Any) -> None:
    """Prints a value as JSON."""
    import json

    echo(json.dumps(value, indent=1))


def echo_text(text: str) -> None:
    """Prints a text of several lines, which is escaped already, unless the command is quiet."""
    if not is_quiet():
        echo(text)


def echo_lines(*lines: str, err: bool = False) -> None:
    """Prints lines, each escaped, unless the command is quiet: the names of files and tensors stay in their line."""
    if not is_quiet():
        for line in lines:
            echo(printable(line), err)


def echo_table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table that fits the terminal; `left` is that of `table`."""
    echo_text(table(rows, left, terminal_width()))


def echo_warnings(warnings: Iterable[str]) -> None:
    """Prints each warning as a line on stderr."""
    for warning in warnings:
        echo(printable(f"warning: {warning}"), err=True)


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, which takes any."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """A line for each tensor that was skipped, or for each reason that many share."""
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(printable(name))
    return [
        f"skipped {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {printable(why)}"
        for why, names in by_reason.items()
    ]
