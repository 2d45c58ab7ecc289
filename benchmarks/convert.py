"""Converting a LoRA against merging it densely: time, and peak memory as the model grows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import models
from benchmarks.table import print_table
from shiradelta.util import text

LARGEST = 11008 * 4096 * 4  # bytes of the largest tensor in float32


def dense_merge(base: Path, lora: Path) -> float:
    """Seconds of W += (B @ A) * s over all tensors, in torch, weights in memory; reading is not counted."""
    spent = 0.0
    with safe_open(lora / "adapter_model.safetensors", "pt") as factors:
        for shard in sorted(base.glob("*.safetensors")):
            with safe_open(shard, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    weight = weights.get_tensor(name).clone()
                    prefix = "base_model.model." + name.removesuffix(".weight")
                    a = factors.get_tensor(f"{prefix}.lora_A.weight")
                    b = factors.get_tensor(f"{prefix}.lora_B.weight")
                    start = time.perf_counter()
                    weight += ((b @ a) * 2.0).to(weight.dtype)
                    spent += time.perf_counter() - start
    return spent


_CHILD = """
import sys, time
from shiradelta.converters import convert
import numpy

def peak():  # of this process alone, unlike ru_maxrss, which starts with the parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

idle, start = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], base=sys.argv[3] or None)
print(time.perf_counter() - start, peak() - idle)
"""


def run_convert(lora: Path, out: Path, base: Path | None) -> tuple[float, int]:
    """(seconds, bytes of peak memory over the idle interpreter's), in a process of its own.

    Mapped pages of the files count as memory here, though the system may drop them at any time.
    """
    command = [sys.executable, "-c", _CHILD, str(lora), str(out), str(base or "")]
    spent, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(spent), int(float(peak))


def main() -> None:
    """Prints the table."""
    rows = [
        ["layers", "weights", "base", "dense merge", "convert", "x merge", "bar", "peak memory", "x largest", "bar"]
    ]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        for layers in (1, 4):
            base, lora = root / f"base{layers}", root / f"lora{layers}"
            models.write_base(base, layers)
            models.write_lora(lora, layers)
            merge = min(dense_merge(base, lora) for _ in range(3))
            for with_base in (False, True):
                runs = [run_convert(lora, root / "out.shd", base if with_base else None) for _ in range(3)]
                spent, peak = min(run[0] for run in runs), max(run[1] for run in runs)
                rows.append(
                    [
                        str(layers),
                        f"{sum(a * b for a, b in models.names(layers).values()) / 1e6:.0f} M",
                        "yes" if with_base else "no",
                        f"{merge:.2f} s",
                        f"{spent:.2f} s",
                        f"{spent / merge:.2f}",
                        "4",
                        text.size(peak),
                        f"{peak / LARGEST:.2f}",
                        "6",
                    ]
                )
    threads = torch.get_num_threads()
    print_table(
        f"LoRA r = 16 on random weights in Llama-2-7B shapes, bf16, 1 %, int4; torch with {threads} threads", rows
    )


if __name__ == "__main__":
    main()
