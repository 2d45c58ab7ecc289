"""`shiradelta apply`."""

from __future__ import annotations

import dataclasses
import shlex

import click

from shiradelta.cli import options
from shiradelta.cli.mistakes import misread_strength
from shiradelta.cli.options import command
from shiradelta.cli.output import delta_from, echo_json, echo_lines, echo_warnings
from shiradelta.cli.progress import progress_bar
from shiradelta.errors import ArgumentError
from shiradelta.util.text import count


@command(
    extra="apply one delta after the other, or make one of them with `shiradelta fuse`",
    examples=[
        "apply model/ style.shd",
        "apply model/ style.shd --strength 0.7 -o patched/",
        "apply model/ - < style.shd",
    ],
)
@click.argument("model")
@click.argument("delta")
@click.option("--strength", type=options.STRENGTH, default=1.0, show_default=True, help="Factor for all changes.")
@click.option("-o", "--out", metavar="FOLDER", help="Write a patched copy to this folder and leave MODEL as it is.")
@click.option("--no-check", is_flag=True, help="Allow a base other than the one that the delta was made for.")
@click.option("--allow-dtype", is_flag=True, help="Allow a base in another dtype; its fingerprints are not checked.")
@options.trusted
@options.no_lock
@options.max_memory
@options.as_json
def apply(
    model: str,
    delta: str,
    strength: float,
    out: str | None,
    no_check: bool,
    allow_dtype: bool,
    keys: tuple[str, ...],
    signature: str | None,
    no_lock: bool,
    limit: str | None,
    as_json: bool,
) -> None:
    """Patch DELTA, or - for stdin, into the weights of the folder MODEL.

    `shiradelta revert` takes it out again bit for bit.
    """
    from shiradelta.folder.apply import apply as run

    if (message := misread_strength(delta, "give the strength as --strength {strength}")) is not None:
        raise ArgumentError(message)
    with delta_from(delta, limit) as taken, progress_bar("applying") as progress:
        report = run(
            model,
            taken,
            out=out,
            strength=strength,
            check=not no_check,
            allow_dtype=allow_dtype,
            key=keys or None,
            signature=signature,
            lock=not no_lock,
            progress=progress,
            limit=limit,
        )
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(
        f"{report.folder}: {count(report.tensors, 'tensor')} patched, {report.changed:,} of"
        f" {count(report.nonzeros, 'listed weight')} changed"
        + (f", {count(report.added, 'tensor')} added" if report.added else "")
        + (f", {count(report.dropped, 'tensor')} removed" if report.dropped else "")
    )
    echo_warnings(report.warnings)
    echo_lines(f"take it out again with: shiradelta revert {shlex.quote(str(report.folder))}")
