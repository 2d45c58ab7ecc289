"""`python -m examples.diffusers PIPELINE DELTA`: the same image without a delta, with it, and without it again.

A pipeline's delta has its components' names (`unet/...`), as `shiradelta convert TUNED --base PIPELINE` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DiffusionPipeline

import shiradelta as sd


@click.command()
@click.argument("pipeline")
@click.argument("delta")
@click.option("--prompt", help="For pipelines that take one.")
@click.option("--strength", "strengths", multiple=True, default=["1"], help="A number, or unet=0.8; may be repeated.")
@click.option("--steps", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=".", show_default=True, help="Folder for before.png, with.png and after.png.")
def main(
    pipeline: str, delta: str, prompt: str | None, strengths: Sequence[str], steps: int, seed: int, out: str
) -> None:
    """Draw one image three times: PIPELINE, PIPELINE with DELTA, and with the delta taken out."""
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)

    def draw(name: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        words = {} if prompt is None else {"prompt": prompt}
        image = pipe(generator=generator, num_inference_steps=steps, **words).images[0]
        image.save(Path(out) / f"{name}.png")
        return image

    before = draw("before")
    swap = sd.load(pipe, delta, parsed(strengths))
    click.echo(f"on the weights: {swap.active}")
    draw("with")
    swap.revert()
    click.echo(f"the same image after revert: {draw('after') == before}")


def parsed(strengths: Sequence[str]) -> float | dict[str, float]:
    """0.8, or {"unet": 0.8} of "unet=0.8"."""
    if all("=" in each for each in strengths):
        return {name: float(value) for name, _, value in (each.rpartition("=") for each in strengths)}
    return float(strengths[-1])


if __name__ == "__main__":
    main()
