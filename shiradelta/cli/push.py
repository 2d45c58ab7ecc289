"""`shiradelta push`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines, echo_warnings


@command(
    extra="push one delta at a time",
    examples=["push style.shd user/style --base-model org/model --license apache-2.0"],
)
@click.argument("delta")
@click.argument("repo", metavar="USER/REPO")
@click.option("--name", metavar="FILE", help="Name of the file there.  [default: its own]")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, which is made if it is not there.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--base-model", metavar="USER/REPO", help="The base on the Hub.  [default: what the file says]")
@click.option("--base-revision", metavar="REVISION", help="Commit or branch of the base.")
@click.option("--license", metavar="ID", help="Licence, such as apache-2.0.  [default: what the file says]")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Further tag of the card.  May be repeated.")
@click.option("--replace-card", is_flag=True, help="Write a new README.md where there is one.")
@options.as_json
def push(delta: str, repo: str, as_json: bool, **settings: Any) -> None:
    """Upload the file DELTA to the repository USER/REPO of the Hugging Face Hub.

    With it go a model card (README.md), and DELTA.sig if that is there. A repository that is not there is made. Log in
    first, with `hf auth login`.
    """
    from shiradelta.publish.push import push_to_hub

    report = push_to_hub(delta, repo, **settings)
    echo_warnings(report.warnings)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(f"{report.path}: pushed {', '.join(report.files)}; {report.url}")
