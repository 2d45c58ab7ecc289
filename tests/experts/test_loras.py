"""A family of LoRAs, as ELREA trains them, becomes a family of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shiradelta
from shiradelta import experts
from shiradelta.models import tiny


def loss(model: nn.Module, prompts: Sequence[list[int]]) -> Tensor:
    ids = torch.tensor(prompts)
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


@pytest.mark.filterwarnings("ignore")
def test_loras_become_a_family(tmp_path: Path):
    tiny.write_model(tmp_path / "model")
    for number, name in enumerate(("base", "one", "other")):
        tiny.write_lora(tmp_path / name, "model")
        file = tmp_path / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(number)
        factors = {key: torch.randn(one.shape, generator=generator) / 9 for key, one in load_file(file).items()}
        save_file(factors, file)
        shiradelta.convert(tmp_path / name, tmp_path / f"{name}.shd", 0.1, base=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    prompts = [[number, *range(100 * (number % 2), 100 * (number % 2) + 6)] for number in range(8)]
    members = [tmp_path / "one.shd", tmp_path / "other.shd"]
    family = experts.assemble_family(
        model, tmp_path / "base.shd", members, prompts, [0, 1] * 4, loss, tmp_path / "family", dims=512
    )
    assert family.examples == (4, 4)
    router = experts.ExpertRouter(model, family, loss)
    new = [[20 + number, *range(100 * (number % 2), 100 * (number % 2) + 6)] for number in range(6)]
    assert router.cosines(new).argmax(1).tolist() == [0, 1] * 3
    assert set(router.swap.switch(router.route(new[:1])).active) == {"expert-0", "expert-1"}
