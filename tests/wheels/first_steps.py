"""What a newcomer does, with an installed package, in an empty folder: run by `test_first_steps.py`, not imported.

The environment's PATH has no compiler, HF_ENDPOINT is a stand-in of the Hub.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
import transformers

import shiradelta as sd
from shiradelta.backends.choose import choose

for tool in ("cc", "gcc", "clang", "cl"):
    assert shutil.which(tool) is None, tool
assert Path(sd.__file__).is_relative_to(sys.prefix), sd.__file__
assert choose().name == "libshd"


def shiradelta(line: str) -> str:
    """Runs a command; what it prints."""
    command = [str(Path(sys.executable).with_name("shiradelta")), *line.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ shiradelta {line}\n{done.stdout}", flush=True)
    assert done.returncode == 0, line
    return done.stdout


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def differing(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> int:
    return sum(int((weight != before[name]).sum()) for name, weight in model.named_parameters())


# A demo; then the same by hand.
shiradelta("demo --keep tiny")
shiradelta("convert tiny/lora --base tiny/model --sparsity 5% -o style.shd")
shiradelta("info --verify style.shd")
base = Path("tiny/model/model.safetensors").read_bytes()
shiradelta("apply tiny/model style.shd")
assert Path("tiny/model/model.safetensors").read_bytes() != base
assert "patched: exactly style.shd" in shiradelta("verify tiny/model")
shiradelta("revert tiny/model")
assert Path("tiny/model/model.safetensors").read_bytes() == base
assert "base: " in shiradelta("verify tiny/model")

# One line, on a model of transformers.
model = transformers.AutoModelForCausalLM.from_pretrained("tiny/model")
before = weights(model)
swap = sd.load(model, "style.shd", strength=0.8)
assert differing(model, before) > 500
swap.revert()
assert differing(model, before) == 0

# One line, on a pipeline of diffusers.
sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "norm_num_groups": 4}
blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
torch.manual_seed(0)
pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**sizes, **blocks), diffusers.DDPMScheduler())
pipeline.save_pretrained("pipeline")
tuned = diffusers.DDPMPipeline.from_pretrained("pipeline")
with torch.no_grad():
    for weight in tuned.unet.parameters():
        weight += 0.01 * torch.randn_like(weight)
tuned.save_pretrained("tuned")
shiradelta("convert tuned --base pipeline --sparsity 5% -o look.shd")
before = weights(pipeline.unet)
swap = sd.load(pipeline, "look.shd", strength={"unet": 0.8})
assert differing(pipeline.unet, before) > 100
swap.revert()
assert differing(pipeline.unet, before) == 0

# To the Hub, and from it.
shiradelta("push style.shd user/style --base-model org/tiny --license apache-2.0")
before = weights(model)
swap = sd.load(model, "user/style", strength=0.8)
assert differing(model, before) > 500
swap.revert()
assert differing(model, before) == 0
print("all steps done")
