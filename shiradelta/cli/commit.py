"""`shiradelta commit`."""

from __future__ import annotations

import dataclasses

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines


@command(
    extra="give one model at a time",
    examples=["commit model/"],
)
@click.argument("model")
@click.option("--forget", is_flag=True, help="Record no digests of the files, and delete what is recorded of MODEL.")
@options.no_lock
@options.as_json
def commit(model: str, forget: bool, no_lock: bool, as_json: bool) -> None:
    """Make the present weights of the folder MODEL its base.

    The deltas on it cannot be taken out any more. Digests of the weight files are recorded, so that
    `shiradelta verify` can tell whether MODEL is still this base.
    """
    from shiradelta.folder.commit import commit as run

    report = run(model, forget=forget, lock=not no_lock)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    with_ = ", ".join(entry.file for entry in report.deltas)
    did = "nothing is recorded of it any more" if forget else f"is a base now; digests recorded: {report.files}"
    echo_lines(f"{model}: {did}" + (f"; {with_} cannot be taken out any more" if with_ else ""))
