"""`shiradelta export`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import RegistryChoice, command
from shiradelta.cli.output import delta_from, echo_json, echo_lines, echo_table, echo_warnings
from shiradelta.cli.progress import progress_bar
from shiradelta.util.text import count, percent, size


def _list_layouts(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from shiradelta.exports import EXPORTS

        echo_table([["layout", "what it writes"], *([name, row.help] for name, row in EXPORTS.items())], left=2)
        context.exit()


@command(
    extra="give one delta at a time",
    examples=["export style.shd peft-shira adapter/", "export style.shd merged patched/ --model model/"],
)
@click.argument("delta")
@click.argument("layout", metavar="LAYOUT", type=RegistryChoice("shiradelta.exports:EXPORTS"))
@click.argument("out")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_layouts,
    help="List the layouts, and exit.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Folder or file of the base model; merged and sparse-undo need it, and sparse for additions.",
)
@click.option("--rank", type=int, help="Rank of each layer's factors, for peft-lora.  [default: 16]")
@click.option("--energy", type=options.SHARE, help="Share of each layer's energy to keep instead, such as 90%.")
@click.option("--strength", type=options.STRENGTH, help="Factor for all changes, for merged.  [default: 1]")
@options.max_memory
@options.as_json
def export(delta: str, limit: str | None, as_json: bool, **arguments: Any) -> None:
    """Write DELTA, or - for stdin, in the layout of another library to OUT, a file or a folder."""
    from shiradelta.exports.run import export as run

    with delta_from(delta, limit) as taken, progress_bar("exporting") as progress:
        report = run(taken, **arguments, progress=progress, limit=limit)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    kept = "" if report.energy_kept is None else f", {percent(report.energy_kept)} of the energy kept"
    ranks = sorted(set(report.ranks.values()))
    some = f", ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f", rank {ranks[0]}" if ranks else ""
    echo_warnings(report.warnings)
    echo_lines(
        f"{report.out}: {report.layout}, {count(report.tensors, 'tensor')}, {count(report.nonzeros, 'nonzero')},"
        f" {size(report.bytes)}{some}{kept}"
    )
