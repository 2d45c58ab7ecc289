"""Random switches of models that are spread over processes: after each, all have the bits of one process.

`python -m tests.hotswap.ranks_at_random --count 1000` prints for each layout how it went: deltas are loaded, unloaded,
switched on and off in random sets with random strengths, and reverted.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shiradelta import HotSwap
from shiradelta.models.layout import Layout, Region
from tests.ranks import run
from tests.swapping import adapter, bits, formula, random_delta

#: The names of the deltas, and their operations.
DELTAS = {"one": "add", "two": "add", "three": "add", "four": "add", "set": "set"}
#: A layout and the number of processes.
LAYOUTS = [
    *(("tp", 2), ("fsdp", 2), ("uneven", 2), ("qkv", 2)),
    *(("tp", 4), ("fsdp", 4), ("both", 4), ("uneven", 4), ("qkv", 4)),
]
#: Rows of a head, and heads of queries and of keys.
_HEAD, _QUERIES, _KEYS = 4, 4, 2


class Net(torch.nn.Module):
    """Two linear layers, whose sizes no number of processes divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = (
            torch.nn.Linear(8, 13),
            torch.nn.Linear(13, 8),
            torch.nn.LayerNorm(8, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def net() -> Net:
    return Net().to(torch.bfloat16)


def spread(kind: str) -> Net:
    """The net, spread as FSDP2 or tensor parallelism does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, count = net(), dist.get_world_size()
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
        return model
    shape = (count,) if kind == "tp" else (2, count // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp",) if kind == "tp" else ("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind == "both":
        fully_shard(model, mesh=mesh["dp"])
    return model


def whole(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All bits, gathered."""
    return {name: _gathered(tensor) for name, tensor in model.state_dict().items()}


def _gathered(tensor: Any) -> np.ndarray:
    return bits(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


class Spread:
    """A model's part in this process, and the whole model, in one process, to compare it with.

    Attributes:
        single: the whole model, for a session of one process.
        options: what the session of this process's part is given beside it.
    """

    single: Any
    options: dict[str, Any]

    def __init__(self, kind: str) -> None:
        self.single, self.model, self.options = net(), spread(kind), {}

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Bits that have to be equal."""
        found, expected = whole(self.model), self.single.state_dict()
        return [(found[name], bits(expected[name])) for name in expected]


class Uneven(Spread):
    """Tensors of which the processes have more, fewer or no rows and columns."""

    def __init__(self) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        self.single, self.options = weights({"rows": (5, 8), "few": (3,), "columns": (7, 3)}), {}
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model: Any = {
            name: distribute_tensor(one.clone(), mesh, [Shard(int(name == "columns"))])
            for name, one in self.single.items()
        }

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(_gathered(self.model[name]), bits(one)) for name, one in self.single.items()]


class Fused(Spread):
    """Queries, keys and values in one weight of each process, as serving engines have them; with four, keys twice."""

    def __init__(self) -> None:
        rows = {"q": _QUERIES * _HEAD, "k": _KEYS * _HEAD, "v": _KEYS * _HEAD}
        self.single = weights({name: (count, 6) for name, count in rows.items()})
        rank, count = dist.get_rank(), dist.get_world_size()
        own, head = rows["q"] // count, rank * _KEYS // count
        first = {"q": rank * own, "k": head * _HEAD, "v": head * _HEAD}
        size = {"q": own, "k": _HEAD, "v": _HEAD}
        self._own = {name: slice(first[name], first[name] + size[name]) for name in rows}
        qkv = torch.cat([self.single[name][part] for name, part in self._own.items()])
        self.model, self._parts = {"qkv": qkv}, dict(zip(rows, qkv.split(list(size.values())), strict=True))
        layout = {name: Layout((rows[name], 6), [Region(part, (first[name], 0))]) for name, part in self._parts.items()}
        self.options = {"layout": layout, "group": dist.group.WORLD}

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(bits(self._parts[name]), bits(self.single[name][part])) for name, part in self._own.items()]


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random bf16 weights, the same in all processes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def made(kind: str) -> Spread:
    """A model in a layout."""
    return Uneven() if kind == "uneven" else Fused() if kind == "qkv" else Spread(kind)


def delta(seed: int, op: str = "add", base: Any = None) -> bytes:
    """A delta of a quarter of all weights, by default of the net's."""
    base = net().state_dict() if base is None else base
    return adapter(
        {
            name: random_delta(tuple(one.shape), max(1, one.numel() // 4), 10 * seed + i, op=op, base=one)
            for i, (name, one) in enumerate(base.items())
        }
    )


def at_random(rank: int, kind: str, count: int, seed: int) -> tuple[int, int, float]:
    """Does the same random calls on a model's parts and on the whole model.

    Returns:
        (number of switches and reverts, elements that differed after any of them, seconds).
    """
    both = made(kind)
    state = both.single.state_dict() if isinstance(both.single, torch.nn.Module) else both.single
    base = {name: bits(one) for name, one in state.items()}
    files = {name: delta(number, op, state) for number, (name, op) in enumerate(DELTAS.items())}
    sessions = HotSwap(both.single), HotSwap(both.model, **both.options)
    chance = random.Random(seed)  # the same in all processes
    done = differ = 0
    start = time.perf_counter()
    while done < count:
        loaded, active = sessions[0].loaded, sessions[0].active
        idle = sorted(loaded.keys() - active.keys())
        what = chance.random()
        if len(loaded) < 2 or (what < 0.1 and len(loaded) < len(files)):
            name = chance.choice(sorted(files.keys() - loaded.keys()))
            reports = [session.load(name, files[name]) for session in sessions]
            assert (reports[1].unmatched, reports[1].unchecked) == ((), ())
            continue
        if what < 0.2 and idle:
            name = chance.choice(idle)
            for session in sessions:
                session.unload(name)
            continue
        chosen = {
            name: 1.0 if DELTAS[name] == "set" else round(chance.uniform(-2, 2), 3)
            for name in sorted(loaded)
            if chance.random() < 0.5
        }
        for session in sessions:
            session.revert() if what > 0.9 else session.switch(chosen)
        assert sessions[0].active == sessions[1].active == ({} if what > 0.9 else chosen)
        done += 1
        differ += sum(int((found != expected).sum()) for found, expected in both.pairs())
        if done % 10 == 0:  # and one process has what the specification says
            on = [(files[name], alpha) for name, alpha in sessions[0].active.items()]
            assert all(np.array_equal(bits(one), formula(base[n], "bfloat16", on, n)) for n, one in state.items())
    for session in sessions:
        session.revert()
    assert all(np.array_equal(bits(one), base[name]) for name, one in state.items())
    differ += sum(int((found != expected).sum()) for found, expected in both.pairs())
    return done, differ, time.perf_counter() - start


def main() -> None:
    """Prints a line for each layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind, processes in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            found = run(at_random, processes, Path(folder), kind, options.count, options.seed)
        differ = sum(one[1] for one in found)
        print(f"{kind}, {processes} processes: {found[0][0]} switches in {found[0][2]:.1f} s, {differ} elements differ")


if __name__ == "__main__":
    main()
