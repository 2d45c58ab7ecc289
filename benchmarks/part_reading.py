"""How much of a file each process reads and how long loading takes, where rows or columns are spread over processes.

`torchrun --nproc-per-node 4 -m benchmarks.part_reading` prints, for FSDP2 (rows of all tensors) and for tensor
parallelism (rows, or columns of what follows), the share of the file that processes read, least and most, and the
median time of loading it from the system's cache.  Tensors have the shapes of Llama-2-7B; 1 % of the weights change.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shiradelta as sd

_WIDE, _NARROW = 11008, 4096
_SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (_NARROW, _NARROW)),
    **dict.fromkeys(("gate", "up"), (_WIDE, _NARROW)),
    "down": (_NARROW, _WIDE),
}
#: Tensors of which tensor parallelism spreads the columns.
_BY_COLUMNS = ("o", "down")


def write(path: Path, layers: int) -> None:
    """A file of random deltas."""
    rng = np.random.default_rng(0)
    deltas = {}
    for layer in range(layers):
        for name, shape in _SHAPES.items():
            numel = shape[0] * shape[1]
            at = np.unique(rng.integers(0, numel, numel // 100))
            deltas[f"{layer}.{name}"] = sd.TensorDelta(shape, at, rng.standard_normal(at.size), "bfloat16")
    sd.save_delta(path, deltas, values="bf16")


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def part(name: str, by_columns: bool) -> DTensor:
    """This process's part of a tensor."""
    count = dist.get_world_size()
    dim, shape = int(by_columns), list(_SHAPES[name])
    shape[dim] //= count
    local = torch.zeros(shape, dtype=torch.bfloat16)
    return DTensor.from_local(local, init_device_mesh("cpu", (count,)), [Shard(dim)], run_check=False)


def measure(path: Path, layers: int, kind: str, repeats: int) -> tuple[float, float]:
    """(share of the file that this process reads, median seconds of loading)."""
    columns = _BY_COLUMNS if kind == "tensor parallelism" else ()
    model = {f"{layer}.{name}": part(name, name in columns) for layer in range(layers) for name in _SHAPES}
    swap = sd.HotSwap(model)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        before, start = bytes_read(), time.perf_counter()
        swap.load("a", path, check=False)
        seconds.append(time.perf_counter() - start)
        read = bytes_read() - before
        swap.unload("a")
    return read / path.stat().st_size, statistics.median(seconds[1:])


def main() -> None:
    """Prints a line for each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.shd"
        if dist.get_rank() == 0:
            write(path, options.layers)
        paths = [path]
        dist.broadcast_object_list(paths)
        for kind in ("FSDP2", "tensor parallelism"):
            mine = measure(paths[0], options.layers, kind, options.repeats)
            every = [(0.0, 0.0)] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            shares, seconds = zip(*every, strict=True)
            if dist.get_rank() == 0:
                least, most = min(shares), max(shares)
                print(
                    f"{kind},{dist.get_world_size()},{os.stat(path).st_size},{least:.3f},{most:.3f},{max(seconds):.3f}"
                )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
