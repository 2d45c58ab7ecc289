"""A training step: ours, PEFT's LoRA, DoRA and SHiRA, full fine-tuning; time and peak memory, side by side.

The stage is transformers' Llama with random weights, layers in the shapes of Llama-7B, bf16, no checkpointing; q, k, v,
up and down are trained, with as many parameters as a LoRA of rank 32 has (full fine-tuning trains everything).
`python -m benchmarks.training OUT` writes training.csv; `--tiny` is for trying it on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.table import machine, print_table
from shiradelta import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 100}
#: (sequences, tokens of each): the issue's 4,096 tokens, and more, so that activations dominate.
SETTINGS = [(16, 256), (64, 256)]
WARM_UP, STEPS = 3, 10


def base(sizes: dict[str, int], layers: int) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, use_cache=False))
    return model.to(torch.bfloat16).train()


def ours(model: nn.Module, rank: int) -> nn.Module:
    mask = {}
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight").endswith(tuple(TARGETS)):
            count = rank * sum(weight.shape)
            mask[name] = torch.randperm(weight.numel(), device=weight.device)[:count]
    train.attach(model, mask=mask, targets=TARGETS)
    return model


def peft(kind: str, cast: bool = True, **options: Any) -> Callable[[nn.Module, int], nn.Module]:
    def attach(model: nn.Module, rank: int) -> nn.Module:
        import peft as library

        made = getattr(library, kind)(r=rank, target_modules=TARGETS, **options)
        return library.get_peft_model(model, made, autocast_adapter_dtype=cast)  # type: ignore[no-any-return]

    return attach


def full(model: nn.Module, rank: int) -> nn.Module:
    return model


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "ours": ours,
    "PEFT LoRA": peft("LoraConfig", lora_alpha=64),
    "PEFT LoRA, bf16 adapters": peft("LoraConfig", lora_alpha=64, cast=False),
    "PEFT DoRA": peft("LoraConfig", lora_alpha=64, use_dora=True),
    "PEFT SHiRA": peft("ShiraConfig", random_seed=0),
    "full fine-tuning": full,
}


def measure(method: str, sizes: dict[str, int], layers: int, batch: tuple[int, int], rank: int) -> dict[str, Any]:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = METHODS[method](base(sizes, layers), rank)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = torch.randint(0, sizes["vocab_size"], batch, device=DEVICE)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    times = []
    for _ in range(WARM_UP + STEPS):
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - start)
    return {
        "method": method,
        "layers": layers,
        "sequences": batch[0],
        "tokens": batch[0] * batch[1],
        "trained": sum(weight.numel() for weight in weights),
        "seconds": statistics.median(times[WARM_UP:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
    }


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="all methods in turn, this often; the faster counts")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes, rank = (TINY, 4) if options.tiny else (LLAMA_7B, 32)
    rows: list[dict[str, Any]] = []
    for batch in [(2, 16)] if options.tiny else SETTINGS:
        best: dict[str, dict[str, Any]] = {}
        for round_number in range(options.rounds):
            for method in METHODS:
                if round_number and method == "full fine-tuning":
                    continue
                try:
                    row = measure(method, sizes, options.layers, batch, rank)
                except torch.OutOfMemoryError:
                    print(f"{method}: out of memory at {batch}", flush=True)
                    continue
                print(*row.values(), flush=True)
                if method not in best or row["seconds"] < best[method]["seconds"]:
                    best[method] = row
        rows += best.values()
        summarise(list(best.values()), batch)
    write(rows, options.out / "training.csv")


def summarise(rows: list[dict[str, Any]], batch: tuple[int, int]) -> None:
    mine = next(row for row in rows if row["method"] == "ours")
    lines = [["method", "trained", "ms a step", "ours", "peak GiB", "ours"]]
    for row in rows:
        time_ratio = f"{mine['seconds'] / row['seconds']:.3f} x"
        memory_ratio = f"{mine['peak_bytes'] / max(row['peak_bytes'], 1):.3f} x"
        peak = f"{row['peak_bytes'] / 2**30:.2f}"
        lines.append(
            [row["method"], f"{row['trained']:,}", f"{row['seconds'] * 1e3:.1f}", time_ratio, peak, memory_ratio]
        )
    print_table(f"a training step, {batch[0]} x {batch[1]} tokens, {mine['layers']} layers", lines)


def about() -> dict[str, str]:
    """What it was measured with."""
    import peft as peft_library
    import transformers

    card = torch.cuda.get_device_name() if DEVICE == "cuda" else machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft_library.__version__}"
    return {"machine": card, "versions": versions}


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *about()])
        writer.writeheader()
        writer.writerows({**row, **about()} for row in rows)


if __name__ == "__main__":
    main()
