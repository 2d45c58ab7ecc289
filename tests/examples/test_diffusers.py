"""The example for diffusers, on a tiny random pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import shiradelta as sd
from tests.swapping import random_delta

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # imports diffusers


def test_an_image_comes_back_when_the_delta_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    diffusers = pytest.importorskip("diffusers")
    image = pytest.importorskip("PIL.Image")
    from examples.diffusers.__main__ import main

    monkeypatch.chdir(tmp_path)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**sizes, **blocks), diffusers.DDPMScheduler())
    pipeline.save_pretrained("pipeline")
    weight = pipeline.unet.conv_out.weight
    tensor = random_delta(tuple(weight.shape), 40, 1, "float32", base=weight)
    sd.save_delta("look.shd", {"unet/conv_out.weight": tensor}, values="f32")
    result = CliRunner().invoke(main, ["pipeline", "look.shd", "--steps", "2", "--strength", "unet=0.8"])
    assert result.exit_code == 0, result.output
    assert "{'look/unet': 0.8}" in result.output
    assert "the same image after revert: True" in result.output
    before, drawn, after = (np.asarray(image.open(f"{name}.png")) for name in ("before", "with", "after"))
    assert (before == after).all()
    assert (before != drawn).any()
