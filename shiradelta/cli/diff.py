"""`shiradelta diff`."""

from __future__ import annotations

import dataclasses

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import DASH, echo_json, echo_lines, echo_table, named, open_named
from shiradelta.util.text import count


@command(
    extra="compare two files at a time",
    examples=["diff style.shd other.shd"],
)
@click.argument("first")
@click.argument("second")
@options.max_memory
@options.as_json
@click.pass_context
def diff(context: click.Context, first: str, second: str, limit: str | None, as_json: bool) -> None:
    """Compare what the .shd files FIRST and SECOND change: which tensors, and how many elements.

    Exit code 0 if both change the same elements to the same values, 1 if not.  Codecs and metadata do not count.  One
    of the files may be - for stdin.
    """
    from shiradelta.combine.differences import differences

    if first == second == DASH:
        raise click.UsageError("stdin holds one of the two files; name the other.")
    with open_named(first, limit) as one, open_named(second, limit) as other:
        found = differences(one, other)
        tensors = len({*one, *other})
    if as_json:
        echo_json({"differ": bool(found), "tensors": [dataclasses.asdict(each) for each in found]})
    elif not found:
        echo_lines(f"{named(first)} and {named(second)} change the same: {count(tensors, 'tensor')}")
    else:
        rows = [[each.name, f"{each.first:,}", f"{each.second:,}", f"{each.values:,}", each.why] for each in found]
        head = ["tensor", "only in first", "only in second", "other values", "why"]
        if not any(each.why for each in found):
            head, rows = head[:-1], [row[:-1] for row in rows]
        echo_table([head, *rows])
        elements = sum(each.first + each.second + each.values for each in found)
        of = f"{len(found):,} of {count(tensors, 'tensor')}"
        echo_lines(f"{named(first)} and {named(second)} differ in {of}, at {count(elements, 'element')}")
    context.exit(1 if found else 0)
