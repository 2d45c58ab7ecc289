"""What each of two processes does: DistributedDataParallel and FSDP2 against one process with the whole batch."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shiradelta import train

STEPS = 3


class Net(nn.Module):
    """Small, and without transformers, which the processes need not import."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 60, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x)
        return logits


def model() -> Net:
    torch.manual_seed(1)
    return Net()


def loss(runner: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(runner(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def attach(target: nn.Module, calibration: list[Tensor], prune_steps: int = 0, magnitude: bool = False) -> train.Tuner:
    targets = ["table", "0.1", "1.1", *([] if magnitude else ["0.0.bias"])]
    return train.attach(
        target, 0.1, "snip", targets, calibration, loss=loss, prune_steps=prune_steps, magnitude=magnitude
    )


def steps(runner: nn.Module, parts: list[Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in runner.parameters() if p.requires_grad], lr=0.5)
    for ids in parts:
        optimizer.zero_grad()
        loss(runner, ids).backward()
        optimizer.step()


def whole(tuner: train.Tuner) -> dict[str, Tensor]:
    return {name: value for name, value in tuner.state_dict().items() if name.endswith(("values", "magnitudes"))}


def batches() -> Tensor:
    return torch.randint(0, 60, (STEPS, 4, 9), generator=torch.Generator().manual_seed(0))


def alone(magnitude: bool) -> dict[str, Any]:
    """What one process gives, in which there are no others to sum over: values, positions and an output."""
    ids, single = batches(), model()
    tuner = attach(single, list(ids[0].split(2)), magnitude=magnitude)
    steps(single, list(ids))
    return {"values": whole(tuner), "positions": tuner.positions, "output": single(ids[0]).detach()}


def compare(rank: int, references: Path, out: Path) -> list[tuple[str, float, float, float]]:
    """Trains in two processes as `alone` in one.

    Args:
        rank: of this process.
        references: what `alone` gave, by whether there are magnitudes, as `torch.save` writes it.
        out: the folder of the files that are saved.

    Returns:
        By kind: the largest difference of a value, the largest value, the largest difference of an output.
    """
    ids, told = batches(), []
    halves = list(ids[0].split(2))
    mine = [part.split(2)[rank] for part in ids]
    single = torch.load(references)
    for kind in ("DDP", "FSDP2", "DDP magnitude", "FSDP2 magnitude"):
        magnitude = kind.endswith("magnitude")
        expected, masks = single[magnitude]["values"], single[magnitude]["positions"]
        replica = model()
        base = {name: p.detach().clone() for name, p in replica.named_parameters()}
        tuner = attach(replica, [halves[rank]], magnitude=magnitude)
        assert all(torch.equal(masks[name], where) for name, where in tuner.positions.items())
        if kind.startswith("DDP"):
            runner: nn.Module = nn.parallel.DistributedDataParallel(replica)
        else:
            whole_ones = [weakref.ref(parameter) for parameter in replica.parameters()]
            for layer in replica.layers:
                fully_shard(layer)
            runner = fully_shard(replica)
        steps(runner, mine)
        if kind.startswith("FSDP2"):  # each process has its parts alone
            gc.collect()
            assert not [found for ref in whole_ones if (found := ref()) is not None]
        found = whole(tuner)
        values = max(float((found[name] - expected[name]).abs().max()) for name in expected)
        tuner.save(out / f"{kind}.shd", values="f32")
        with torch.no_grad():
            before = runner(ids[0])
            tuner.load_state_dict(tuner.state_dict())
            outputs = float((runner(ids[0]) - single[magnitude]["output"]).abs().max())
            assert torch.equal(runner(ids[0]), before)
        tuner.detach()
        if kind.startswith("DDP"):
            assert all(torch.equal(p, base[name]) for name, p in replica.named_parameters())
        told.append((kind, values, max(float(value.abs().max()) for value in expected.values()), outputs))
    replica = model()
    tuner = attach(replica, [halves[rank]], prune_steps=2)
    steps(nn.parallel.DistributedDataParallel(replica), mine)
    masks_of_all: list[dict[str, Tensor]] = [{}, {}]
    torch.distributed.all_gather_object(masks_of_all, tuner.positions)
    assert all(torch.equal(where, masks_of_all[1 - rank][name]) for name, where in tuner.positions.items())
    assert tuner.nnz == sum(round(0.1 * weight.numel()) for weight in tuner.weights.values())
    fully_shard(replica)
    state = tuner.state_dict()
    tuner.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in tuner.state_dict().items())

    # Models let go of the group before it is destroyed, and no process leaves while the other still communicates.
    del replica, runner, tuner
    gc.collect()
    torch.distributed.barrier()
    return told
