"""Weights that are not the base's any more after adapters went in and out: PEFT's LoRA merge against HotSwap.

8 adapters in turn, on one linear layer with random weights, in bf16 and fp16: `python -m benchmarks.drift`.  Writes
`drift.csv`, which `python -m benchmarks.plot` draws.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shiradelta as sd
from benchmarks.switch import RESULTS, versions
from benchmarks.table import machine, print_table

SIZE = 512
ADAPTERS = 8


def layer(dtype: torch.dtype) -> torch.nn.Linear:
    """The base."""
    linear = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype).requires_grad_(False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    return linear


def drift(weight: torch.Tensor, cycle: Callable[[int], object], marks: list[int]) -> dict[int, int]:
    """Cycles -> weights whose bits differ from those before the first."""
    before = weight.view(torch.int16).clone()
    found = {}
    for number in range(1, max(marks) + 1):
        cycle(number % ADAPTERS)
        if number in marks:
            found[number] = int((weight.view(torch.int16) != before).sum())
    return found


def peft_lora(dtype: torch.dtype, marks: list[int]) -> dict[int, int]:
    """Merged and unmerged, the way PEFT does it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(torch.nn.Sequential(layer(dtype)), config, adapter_name="0")
    for i in range(1, ADAPTERS):
        model.add_adapter(str(i), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype) * 0.02
    weight = next(parameter.data for name, parameter in model.named_parameters() if "base_layer" in name)

    def cycle(number: int) -> None:
        model.merge_adapter([str(number)])
        model.unmerge_adapter()

    return drift(weight, cycle, marks)


def hotswap(dtype: torch.dtype, marks: list[int]) -> dict[int, int]:
    """Of 1 % each."""
    linear = layer(dtype)
    swap = sd.HotSwap(linear)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ADAPTERS):
            positions = np.sort(rng.choice(SIZE * SIZE, SIZE * SIZE // 100, replace=False))
            values = rng.standard_normal(positions.size) * 0.02
            delta = sd.TensorDelta((SIZE, SIZE), positions, values, str(dtype).removeprefix("torch."))
            sd.save_delta(Path(folder) / "x.shd", {"weight": delta}, values="int8")
            swap.load(str(i), Path(folder) / "x.shd")

    def cycle(number: int) -> None:
        swap.switch(str(number))
        swap.revert()

    return drift(linear.weight.data, cycle, marks)


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="30 cycles instead of 1,000")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    marks = [1, 3, 10, 30] + ([] if options.quick else [100, 300, 1000])
    rows = [["", *(f"{mark} cycles" for mark in marks)]]
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "drift.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["what", "dtype", "cycles", "differ", "weights", "machine", "versions"])
        for what, run in (("PEFT LoRA", peft_lora), ("HotSwap", hotswap)):
            for dtype in (torch.bfloat16, torch.float16):
                name = str(dtype).removeprefix("torch.")
                found = run(dtype, marks)
                for cycles, differ in found.items():
                    writer.writerow([what, name, cycles, differ, SIZE * SIZE, machine(), versions()])
                rows.append([f"{what}, {name}", *(f"{differ / SIZE / SIZE:.2%}" for differ in found.values())])
    print_table("weights that differ from the base after adapters went in and out", rows)


if __name__ == "__main__":
    main()
