"""Switching adapters in a model that is split over GPUs by tensor parallelism, against a copy of each rank's weights.

`torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel`, one GPU a process (gloo and the CPU where there is none):
linear layers in the shapes of Llama-2-7B with random bf16 weights, split by columns (q, k, v, gate, up) and by rows (o,
down).  Times are wall times from a barrier to when the slowest rank's device is done, votes included; memory is that of
one rank.  Loading is compared with that of the same file into whole tensors, in the first rank alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shiradelta as sd
from benchmarks.models import LLAMA_7B_LAYER
from benchmarks.switch import for_all_layers
from benchmarks.table import print_table

#: Modules whose weights are split by columns; the others are split by rows.
BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


def split_model(layers: int, device: torch.device) -> torch.nn.ModuleList:
    """Random weights, of which each rank makes its own part only."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())
    made = torch.nn.ModuleList()
    for _ in range(layers):
        block = torch.nn.ModuleDict()
        for name, (rows, columns) in LLAMA_7B_LAYER.items():
            split = 1 if name in BY_COLUMNS else 0
            shape = [rows, columns]
            shape[split] //= mesh.size()
            local = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            module = torch.nn.Linear(1, 1, bias=False, device="meta")
            module.weight = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(split)]), requires_grad=False)
            block[name.replace(".", "_")] = module
        made.append(block)
    return made


def whole_model(layers: int, device: torch.device) -> torch.nn.ModuleList:
    """The same tensors in one piece each; their values do not matter."""
    made = torch.nn.ModuleList()
    for _ in range(layers):
        block = torch.nn.ModuleDict()
        for name, (rows, columns) in LLAMA_7B_LAYER.items():
            module = torch.nn.Linear(1, 1, bias=False, device="meta")
            module.weight = torch.nn.Parameter(
                torch.zeros(rows, columns, dtype=torch.bfloat16, device=device), requires_grad=False
            )
            block[name.replace(".", "_")] = module
        made.append(block)
    return made


def one_layer(density: float, seed: int, values: str) -> bytes:
    """A file for the first layer: independent positions, random values; nothing is known of the base."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in LLAMA_7B_LAYER.items():
        numel = shape[0] * shape[1]
        positions = np.cumsum(rng.geometric(density, int(numel * density * 1.1) + 64)) - 1
        positions = positions[positions < numel]
        delta = (rng.standard_normal(positions.size) * 0.01).astype(np.float32)
        tensors[f"0.{name.replace('.', '_')}.weight"] = sd.TensorDelta(shape, positions, delta, "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        sd.save_delta(Path(folder) / "layer.shd", tensors, values=values)
        return (Path(folder) / "layer.shd").read_bytes()


def slowest(work: Callable[[], object], repeats: int, after: Callable[[], object] = lambda: None) -> float:
    """The median of what the slowest rank takes, in seconds; `after` runs untimed after each."""
    times = []
    for number in range(repeats + 2):
        _wait()
        dist.barrier()
        start = time.perf_counter()
        work()
        _wait()
        mine = torch.tensor([time.perf_counter() - start], device=_device())
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        if number >= 2:
            times.append(float(mine))
        after()
    return statistics.median(times)


def loading_of(model: torch.nn.ModuleList | None, file: Path) -> float:
    """What loading a file takes the slowest rank that has a model, in seconds; kernels are compiled before."""
    if model is None:
        return slowest(lambda: None, 3)
    swap = sd.HotSwap(model)
    return slowest(lambda: swap.load("timed", file), 3, lambda: swap.unload("timed"))


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model: torch.nn.ModuleList, layers: int, values: str, repeats: int, folder: Path) -> list[list[str]]:
    """Rows of the table, for one codec of values."""
    files = [folder / f"{seed}-{values}.shd" for seed in range(2)]
    if dist.get_rank() == 0:
        for seed, file in enumerate(files):
            file.write_bytes(for_all_layers(one_layer(0.01, seed, values), layers))
    dist.barrier()
    whole_loading = loading_of(whole_model(layers, _device()) if dist.get_rank() == 0 else None, files[0])
    loading = loading_of(model, files[0])
    swap = sd.HotSwap(model)
    reports = [swap.load(file.stem, file) for file in files]
    first, second = (file.stem for file in files)
    apply = slowest(partial(swap.switch, first), repeats, swap.revert)
    swap.switch(first)
    revert = slowest(swap.revert, repeats, partial(swap.switch, first))
    names = cycle([second, first])
    other = slowest(lambda: swap.switch(next(names)), repeats)
    swap.revert()
    weights = [parameter.to_local().view(-1) for parameter in model.parameters() if isinstance(parameter, DTensor)]
    whole = torch.cat(weights)
    into = torch.empty_like(whole)
    copy = slowest(lambda: into.copy_(whole), repeats)
    vote = slowest(lambda: swap.switch({}), repeats)  # nothing changes: the votes alone
    times = {"copy": copy, "nothing": vote, "apply": apply, "revert": revert, "A -> B": other}
    rows = [[values, what, f"{1000 * seconds:.2f} ms", f"{seconds / copy:.2f} x"] for what, seconds in times.items()]
    rows.append([values, "load", f"{1000 * loading:.0f} ms", f"{loading / whole_loading:.1f} x whole tensors"])
    rows.append([values, "load, whole tensors", f"{1000 * whole_loading:.0f} ms", ""])
    size = reports[0].nbytes
    rows.append([values, "memory of an adapter", f"{size / 1e6:.1f} MB", f"{size / whole.nbytes:.4f} x the weights"])
    swap.unload(first)
    swap.unload(second)
    return rows


def main() -> None:
    """Prints the table, from the first rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--values", nargs="+", default=["bf16", "int8"])
    options = parser.parse_args()
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = split_model(options.layers, device)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    rows = [["values", "", "slowest rank", "x its copy"]]
    for values in options.values:
        rows += measure(model, options.layers, values, options.repeats, Path(shared[0]))
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print_table(f"{options.layers} layers of Llama-2-7B, 1 %, on {dist.get_world_size()} x {where}", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
