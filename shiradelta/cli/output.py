"""Prints what commands have in common: JSON, skipped tensors, warnings, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from shiradelta.errors import printable
from shiradelta.util.progress import Progress


def echo_json(value: Any) -> None:
    """Prints a value as JSON."""
    click.echo(json.dumps(value, indent=1))


def echo_lines(*lines: str, err: bool = False) -> None:
    """Prints lines, each escaped: the names of files and tensors in them stay in their line."""
    for line in lines:
        click.echo(printable(line), err=err)


def echo_warnings(warnings: Iterable[str]) -> None:
    """Prints each warning as a line on stderr."""
    echo_lines(*(f"warning: {warning}" for warning in warnings), err=True)


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """A line for each tensor that was skipped, or for each reason that many share."""
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(printable(name))
    return [
        f"skipped {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {printable(why)}"
        for why, names in by_reason.items()
    ]


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress callback that draws a bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    with click.progressbar(
        length=1000, label=label, file=sys.stderr, item_show_func=lambda what: what and printable(str(what))[:48]
    ) as bar:

        def step(what: str, done: int, total: int) -> None:
            bar.update(max(0, round(1000 * done / max(total, 1)) - bar.pos), what)

        yield step
        bar.update(1000 - bar.pos)
