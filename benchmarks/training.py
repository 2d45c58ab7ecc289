"""A training step: ours, PEFT's LoRA, DoRA and SHiRA, full fine-tuning; time and peak memory, side by side.

The stage is transformers' Llama with random weights, layers in the shapes of Llama-7B, bf16, no checkpointing; q, k, v,
up and down are trained, with as many parameters as a LoRA of rank 32 has (full fine-tuning trains everything).
`python -m benchmarks.training OUT` writes training.csv; `--tiny` is for trying it on a CPU.  On several GPUs, each with
a batch of its own: `torchrun --nproc-per-node 2 -m benchmarks.training OUT --spread DDP`, or `FSDP2`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.table import machine, print_table
from shiradelta import train
from shiradelta.train.targets import find_weights

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE != "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
FULL = "full fine-tuning"
PRUNING = "ours, pruned"
#: Pruning steps in a training of 400 steps; nonzeros are pruned after every tenth.
PRUNE_STEPS = 240
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 100}
#: (sequences, tokens of each): the issue's 4,096 tokens, and more, so that activations dominate.
SETTINGS = [(16, 256), (64, 256)]
WARM_UP = 3


def base(sizes: dict[str, int], layers: int) -> nn.Module:
    """Made on the device: transformers draws the weights of a model on the CPU, which takes longer than all else."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=DEVICE)
    with torch.no_grad(), torch.device(DEVICE):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
        for weight in model.parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
    made: nn.Module = model.train()
    return made


def ours(model: nn.Module, rank: int) -> tuple[nn.Module, Callable[[], Any]]:
    mask = {}
    for name, weight in find_weights(model, TARGETS).items():
        count = rank * sum(weight.shape)
        mask[name] = torch.randperm(weight.numel(), device=weight.device)[:count].clone()
    tuner = train.attach(model, mask=mask, targets=TARGETS)
    return model, tuner.detach


def ours_pruned(model: nn.Module, rank: int) -> tuple[nn.Module, Callable[[], Any]]:
    """As many nonzeros at the end.  The first steps, which are measured, have five times as many."""
    weights = find_weights(model, TARGETS).values()
    share = rank * sum(sum(weight.shape) for weight in weights) / sum(weight.numel() for weight in weights)
    tuner = train.attach(model, share, "wm", TARGETS, prune_steps=PRUNE_STEPS)
    return model, tuner.detach


def peft(kind: str, cast: bool = True, **options: Any) -> Attach:
    def attach(model: nn.Module, rank: int) -> tuple[nn.Module, Callable[[], Any]]:
        import peft as library

        made = getattr(library, kind)(r=rank, target_modules=TARGETS, **options)
        tuned = library.get_peft_model(model, made, autocast_adapter_dtype=cast)
        return tuned, tuned.unload

    return attach


def full(model: nn.Module, rank: int) -> tuple[nn.Module, Callable[[], Any]]:
    return model.requires_grad_(True), lambda: None


#: What a method makes of a model, and how it is taken off again.
Attach = Callable[[nn.Module, int], tuple[nn.Module, Callable[[], Any]]]
METHODS: dict[str, Attach] = {
    "ours": ours,
    PRUNING: ours_pruned,
    "PEFT LoRA": peft("LoraConfig", lora_alpha=64),
    "PEFT LoRA, bf16 adapters": peft("LoraConfig", lora_alpha=64, cast=False),
    "PEFT DoRA": peft("LoraConfig", lora_alpha=64, use_dora=True),
    "PEFT SHiRA": peft("ShiraConfig", random_seed=0),
    FULL: full,
}


def fsdp2(model: nn.Module) -> nn.Module:
    """A shard of each layer in each process."""
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    fully_shard(model)
    return model


#: How a model is spread over processes.
SPREAD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "no": lambda model: model,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": fsdp2,
}


def measure(
    method: str, stage: nn.Module, spread: str, batch: tuple[int, int], rank: int, steps: int
) -> dict[str, Any]:
    model, take_off = METHODS[method](stage, rank)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    model = SPREAD[spread](model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = torch.randint(0, stage.config.vocab_size, batch, device=DEVICE)  # type: ignore[union-attr, arg-type]
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    times = []
    for _ in range(WARM_UP + steps):
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    optimizer.zero_grad()
    if spread != "FSDP2":  # which stays as it is
        take_off()
    return {
        "method": method,
        "processes": PROCESSES,
        "spread": spread,
        "layers": len(stage.model.layers),  # type: ignore[union-attr, arg-type]
        "sequences": batch[0],
        "tokens": batch[0] * batch[1],
        "trained": trained,
        "seconds": statistics.fmean(times[WARM_UP:]),  # and not the median: what only every tenth step does counts
        "peak_bytes": peak,
    }


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of the first setting; the faster counts")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, of which the mean counts")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--spread", choices=list(SPREAD), default="no", help="over the processes that torchrun starts")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.spread != "no" and PROCESSES == 1:
        parser.error("processes to spread over: start it with torchrun --nproc-per-node N -m benchmarks.training ...")
    if PROCESSES > 1:
        if ON_GPU:
            torch.cuda.set_device(DEVICE)
        torch.distributed.init_process_group()
    # Pruning needs whole values in one optimizer.
    methods = [method for method in options.methods if (method, options.spread) != (PRUNING, "FSDP2")]
    sizes, rank = (TINY, 4) if options.tiny else (LLAMA_7B, 32)
    stage = None if options.spread == "FSDP2" else base(sizes, options.layers)  # FSDP2 leaves a model in parts
    rows: list[dict[str, Any]] = []
    for batch in [(2, 16)] if options.tiny else SETTINGS:
        best: dict[str, dict[str, Any]] = {}
        rounds = options.rounds if batch == SETTINGS[0] else 1
        turns = [method for _ in range(rounds) for method in methods if method != FULL]
        for method in [*turns, *([FULL] if batch == SETTINGS[0] and FULL in methods else [])]:
            model = base(sizes, options.layers) if stage is None else stage
            row = measure(method, model, options.spread, batch, rank, options.steps)
            del model
            if RANK == 0:
                print(*row.values(), flush=True)
            if method not in best or row["seconds"] < best[method]["seconds"]:
                best[method] = row
        rows += best.values()
        if RANK == 0 and rows:
            write(rows, options.out / "training.csv")
            summarise(list(best.values()), batch)
    if PROCESSES > 1:
        torch.distributed.destroy_process_group()


def summarise(rows: list[dict[str, Any]], batch: tuple[int, int]) -> None:
    mine = next((row for row in rows if row["method"] == "ours"), None)
    if mine is None:
        return  # nothing to compare with
    lines = [["method", "trained", "ms a step", "ours", "peak GiB", "ours"]]
    for row in rows:
        time_ratio = f"{mine['seconds'] / row['seconds']:.3f} x"
        memory_ratio = f"{mine['peak_bytes'] / max(row['peak_bytes'], 1):.3f} x"
        peak = f"{row['peak_bytes'] / 2**30:.2f}"
        lines.append(
            [row["method"], f"{row['trained']:,}", f"{row['seconds'] * 1e3:.1f}", time_ratio, peak, memory_ratio]
        )
    over = "" if PROCESSES == 1 else f", each of {PROCESSES} processes, {mine['spread']}"
    print_table(f"a training step, {batch[0]} x {batch[1]} tokens{over}, {mine['layers']} layers", lines)


def about() -> dict[str, str]:
    """What it was measured with."""
    import peft as peft_library
    import transformers

    card = torch.cuda.get_device_name() if ON_GPU else machine()
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
