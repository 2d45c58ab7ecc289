"""`shiradelta info`."""

from __future__ import annotations

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import DASH, echo_json, echo_lines, echo_text, open_named, terminal_width


@command(
    extra="give one file at a time",
    examples=["info style.shd --verify", "info --system", "info - < style.shd"],
)
@click.argument("file", required=False)
@click.option("--system", is_flag=True, help="Show instead which backend this installation uses, and why.")
@click.option("--verify", "full", is_flag=True, help="Also decode everything and check the content digest.")
@options.max_memory
@options.as_json
def info(file: str | None, system: bool, full: bool, limit: str | None, as_json: bool) -> None:
    """Show what is in a .shd file; - reads it from stdin."""
    if system:
        from shiradelta.backends.libshd.library import describe_system

        found = describe_system()
        if as_json:
            echo_json(found)
        else:
            echo_lines(*(f"{key:>8}: {value}" for key, value in found.items()))
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'; give a .shd file, or --system.")
    from shiradelta.io.describe import describe, summary
    from shiradelta.signing.form import describe_signature

    with open_named(file, limit) as delta:
        if full:
            delta.verify()
        about = describe(delta)
    signature = about["signature"] = None if file == DASH else describe_signature(file)
    if as_json:
        echo_json(about)
        return
    checked = "checked in full" if full else "tables checked; --verify checks everything"
    echo_text(f"{summary(about, terminal_width())}; {checked}\ndigest {about['digest']}")
    if signature is not None:
        says = f"{signature['file']}: a signature by the key {signature['key']}, not verified; `shiradelta verify` does"
        echo_lines(signature["problem"] or says)
