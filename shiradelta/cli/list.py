"""`shiradelta list`."""

from __future__ import annotations

import dataclasses
import shlex

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines
from shiradelta.util.text import count


@command(
    extra="give one model at a time",
    examples=["list model/"],
)
@click.argument("model")
@options.as_json
def list(model: str, as_json: bool) -> None:
    """Show which deltas are on the folder MODEL, the one that `shiradelta revert` takes out next on top.

    The weights are not looked at; `shiradelta verify` does that.
    """
    from shiradelta.folder.listing import recorded

    state = recorded(model)
    if as_json:
        echo_json(dataclasses.asdict(state))
        return
    if state.pending is not None:
        echo_lines(
            f"{state.pending.file}: an action with it was interrupted; `shiradelta revert {shlex.quote(model)}` rolls"
            " it back"
        )
    for entry in reversed(state.applied):
        kind = ", made for what is beneath it" if entry.successor else ""
        echo_lines(
            f"{entry.file} at {entry.strength:g}: {count(entry.tensors, 'tensor')}, {count(entry.nonzeros, 'nonzero')}"
            f"{kind}; digest {entry.digest[:12]}"
        )
    if not state.applied:
        echo_lines(f"{model}: no delta is on it")
