"""`python -m examples.rl FOLDER`: a policy is trained in one process and generates in another, synced by a chain.

The policy is a tiny transformer that adds two digits.  A right sum is worth 1, any other answer 0.  The trainer
publishes its weights as bf16 after every update; the generator's policy takes each step in place, and answers with it.
FOLDER gets the chain, the answers, and `rl.png`.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

from examples.rl.files import save_model
from examples.rl.generator import Synced, generate
from examples.rl.policy import Policy, pretrained
from examples.rl.trainer import train_on_one_core
from shiradelta.chain import Chain
from shiradelta.util.plots import check_plot, new_figure, save, title_and_legend
from shiradelta.util.text import percent, size, table

ROWS = 10


def prepare(root: Path, imitated: int) -> None:
    """Begins a chain with a policy that has imitated answers for some steps, and keeps its float32 weights."""
    policy = pretrained(imitated)
    Chain.create(root / "chain", save_model(policy, root / "model"))
    torch.save(policy.state_dict(), root / "float.pt")


def run(root: Path, updates: int) -> tuple[int, list[Synced]]:
    """Trains in a process of its own, and generates in this one.

    Args:
        root: a folder that `prepare` has seen.
        updates: how many steps the trainer takes.

    Returns:
        How many weights of the generator's policy are not the trainer's, bit for bit, and a row for each version.
    """
    trainer = multiprocessing.get_context("spawn").Process(target=train_on_one_core, args=(root, updates), daemon=True)
    trainer.start()
    try:
        policy, rows = generate(root, updates, trainer.is_alive)
    finally:
        trainer.join(10)
        trainer.kill()
    return differing(policy, root, updates), rows


def differing(policy: Policy, root: Path, version: int) -> int:
    """How many weights are not those that the trainer has published last."""
    last = load_file((root / "trained" / str(version) if version else root / "model") / "model.safetensors")
    found = policy.state_dict()
    return sum(int((found[name].view(torch.int16) != last[name].view(torch.int16)).sum()) for name in last)


def draw(rows: list[Synced], model: int, path: Path) -> None:
    """Draws reward and bytes of every version."""
    figure = new_figure(7, 5)
    above, below = figure.subplots(2, 1, sharex=True)
    versions = [row.version for row in rows]
    above.plot(versions, [row.reward for row in rows], label="right answers")
    above.set_ylabel("share")
    title_and_legend(above, "a policy that is trained in one process and generates in another")
    below.bar(versions[1:], [row.bytes / 1000 for row in rows[1:]], label="the step's file")
    below.axhline(model / 1000, color="grey", linestyle="--", label="the model")
    below.set_ylabel("KB")
    below.set_xlabel("version")
    below.legend(fontsize=8, frameon=False)
    save(figure, path)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--updates", default=100, show_default=True, help="Steps of the trainer.")
@click.option("--imitated", default=300, show_default=True, help="Steps of imitation before it.")
def main(folder: Path, updates: int, imitated: int) -> None:
    """Train a policy in one process and generate in another; FOLDER, which is new, gets what both write."""
    folder.mkdir(parents=True)
    check_plot(folder / "rl.png")
    torch.set_num_threads(1)
    prepare(folder, imitated)
    differ, rows = run(folder, updates)
    model = (folder / "model" / "model.safetensors").stat().st_size
    shown = [row for row in rows if row.version % max(1, updates // ROWS) == 0]
    head = ["version", "right answers", "weights changed", "step", "x model"]
    cells = [
        [str(row.version), percent(row.reward), percent(row.changed), size(row.bytes), f"{row.bytes / model:.3f}"]
        for row in shown
    ]
    click.echo(table([head, *cells], left=0))
    sent = sum(row.bytes for row in rows)
    click.echo(
        f"{updates} steps: {size(sent)}, where {size(model * updates)} of whole models were; {differ} weights differ"
    )
    draw(rows, model, folder / "rl.png")


if __name__ == "__main__":
    main()
