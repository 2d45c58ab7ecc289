"""`shiradelta revert`."""

from __future__ import annotations

import dataclasses

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines
from shiradelta.cli.progress import progress_bar


@command(
    extra="the last delta is taken out, with --all every one",
    examples=["revert model/", "revert model/ --all"],
)
@click.argument("model")
@click.option("--force", is_flag=True, help="Restore the original weights even if they were changed since.")
@click.option("--all", "every", is_flag=True, help="Take out every delta, the last one first; JSON is a list then.")
@options.no_lock
@options.as_json
def revert(model: str, force: bool, every: bool, no_lock: bool, as_json: bool) -> None:
    """Take the last delta out of the folder MODEL, bit for bit.

    If an action was interrupted, roll that back instead.
    """
    from shiradelta.folder.revert import revert as run
    from shiradelta.folder.revert import revert_all as run_all

    with progress_bar("reverting") as progress:
        if every:
            reports = run_all(model, force=force, lock=not no_lock, progress=progress)
        else:
            reports = [run(model, force=force, lock=not no_lock, progress=progress)]
    if as_json:
        found = [dataclasses.asdict(report) for report in reports]
        echo_json(found if every else found[0])
        return
    rolled = [report.delta.file for report in reports if report.interrupted]
    out = [report.delta.file for report in reports if not report.interrupted]
    did = [f"rolled back the interrupted action on {rolled[0]}"] if rolled else []
    did += [f"took out {', '.join(out)}"] if out else []
    none = "no delta is on it any more" if force else "the folder is its base again"
    rest = f"{reports[-1].left} more applied" if reports[-1].left else none
    echo_lines(f"{model}: {' and '.join(did)}, bit for bit; {rest}")
