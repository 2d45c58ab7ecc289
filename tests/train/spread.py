"""What each process does that trains a model of which it has a part: tensor parallelism, and FSDP2 over it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import shiradelta as sd
from shiradelta import train
from tests.hotswap.test_ranks import forget_peak, peak, refusal_of

STEPS = 4


class Net(nn.Module):
    """Two linear layers, whose sizes no number of processes divides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 13), nn.Linear(13, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def seeded(model: nn.Module) -> nn.Module:
    """The model with small multiples of 1/4, the same everywhere: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape, generator=generator) / 4)
    return model


#: Kind -> (a model of one layer, how it is split).
LAYERS: dict[str, tuple[Any, Any]] = {
    "columns": (lambda: nn.Linear(8, 13), lambda: ColwiseParallel(output_layouts=Replicate())),
    "rows": (lambda: nn.Linear(13, 8), lambda: RowwiseParallel(input_layouts=Replicate())),
    "table by rows": (lambda: nn.Embedding(13, 6), lambda: RowwiseParallel(input_layouts=Replicate())),
    "table by columns": (lambda: nn.Embedding(7, 13), lambda: ColwiseParallel(output_layouts=Replicate())),
}


def layer(kind: str) -> nn.Sequential:
    made = seeded(nn.Sequential(LAYERS[kind][0]()))
    assert isinstance(made, nn.Sequential)
    return made


def batch(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Inputs and wanted outputs, of few bits."""
    generator = torch.Generator().manual_seed(1)
    one = model[0]
    if isinstance(one, nn.Embedding):
        ids = torch.randint(0, one.num_embeddings, (6,), generator=generator)
        return ids, torch.randint(-2, 3, (6, one.embedding_dim), generator=generator).float()
    x, y = (
        torch.randint(-2, 3, (5, size), generator=generator).float() for size in (one.in_features, one.out_features)
    )
    return x, y


def steps(model: nn.Module, inputs: Tensor, wanted: Tensor, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(inputs) - wanted).square().sum().backward()
        optimizer.step()


def exactly(model: nn.Sequential, whole: nn.Sequential, path: Path, mask: Any) -> dict[str, Any]:
    """Trains a layer; what it has then."""
    base = {name: one.detach().clone() for name, one in whole.named_parameters()}
    tuner = train.attach(model, 0.3, mask, targets=r"0\..*", seed=3)
    inputs, wanted = batch(whole)
    steps(model, inputs, wanted, torch.optim.SGD(tuner.parameters(), lr=2**-4))
    with torch.no_grad():
        output = model(inputs)
    tuner.save(path, "f32", {"created_by": "this test"})  # whatever a process has imported
    if dist.is_initialized():
        dist.barrier()  # the first process writes
    state = tuner.state_dict()
    found = {"output": full(output).numpy(), **{name: one.numpy().copy() for name, one in state.items()}}
    found |= {f"{name}: base": one.numpy().copy() for name, one in tuner.base.items()}
    found |= {f"{name}: mask": one.numpy().copy() for name, one in tuner.positions.items()}
    found["counts"] = np.array([tuner.nnz, tuner.numel])
    tuner.detach()
    assert all(torch.equal(full(one), base[name]) for name, one in model.named_parameters())
    for how in ("state", "file"):
        if how == "state":
            again = train.reattach(model, state)
        else:
            again = train.attach(model, 0.3, targets=r"0\..*", start=path)
        with torch.no_grad():
            assert torch.equal(full(model(inputs)), full(output))
            for values in again.values.values():
                values.zero_()
            assert not torch.equal(full(model(inputs)), full(output))
            if how == "state":
                again.load_state_dict(state)
                assert torch.equal(full(model(inputs)), full(output))
        again.detach()
    return found


def full(tensor: Any) -> Tensor:
    """The whole tensor, gathered."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()


def one_layer(rank: int, kind: str, folder: Path, mask: Any) -> dict[str, Any]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = layer(kind)
    model = parallelize_module(copy.deepcopy(whole), mesh, {"0": LAYERS[kind][1]()})
    assert isinstance(model, nn.Sequential)
    return exactly(model, whole, folder / "spread.shd", mask)


def in_half(model: nn.Sequential, whole: nn.Sequential, path: Path) -> dict[str, Any]:
    """Trains a layer of 16-bit weights, and goes on from values that are the same everywhere; what it has then."""
    tuner = train.attach(model, 0.3, targets=r"0\..*", seed=3)
    inputs, wanted = (one.to(whole[0].weight.dtype) if one.is_floating_point() else one for one in batch(whole))
    steps(model, inputs, wanted, torch.optim.SGD(tuner.parameters(), lr=2**-4))
    state = tuner.state_dict()
    state |= {name: torch.arange(len(one)) / 8 for name, one in state.items() if name.endswith("values")}
    tuner.load_state_dict(state)
    tuner.save(path, "f32", {"created_by": "this test"})
    return {name: one.view(torch.int16).numpy().copy() for name, one in tuner.base.items()} | {
        f"{name}: now": full(one).view(torch.int16).numpy().copy()
        for name, one in model.named_parameters()
        if one.dtype == whole[0].weight.dtype
    }


def layer_in_half(rank: int, kind: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = layer(kind).to(dtype)
    model = parallelize_module(copy.deepcopy(whole), mesh, {"0": LAYERS[kind][1]()})
    assert isinstance(model, nn.Sequential)
    return in_half(model, whole, folder / "spread.shd")


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)


def by_adam(model: nn.Module, parts: list[slice], distribute: Any = None) -> dict[str, np.ndarray]:
    """Trains a net by Adam, with gradients clipped; what the values are then, and the last norm."""
    tuner = train.attach(model, 0.3, "rand", targets=["norm", "up.weight", "up.bias", "down"])
    if distribute is not None:
        distribute(model)
    inputs, wanted = examples()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in parts:
            (model(inputs[part]) - wanted[part]).square().mean().div(len(parts)).backward()
        norm = nn.utils.clip_grad_norm_(tuner.parameters(), 0.1)
        optimizer.step()
    state = {name: one.clone() for name, one in tuner.state_dict().items()}
    with torch.no_grad():
        output = full(model(inputs))
        for values in tuner.values.values():
            values.zero_()
        tuner.load_state_dict(state)
        assert torch.equal(full(model(inputs)), output)
    assert all(torch.equal(one, state[name]) for name, one in tuner.state_dict().items())
    assert float(norm) > 0.1  # so that the gradients were clipped
    return {name: one.numpy().copy() for name, one in state.items()} | {
        "norm": full(norm).numpy(),
        "out": output.numpy(),
    }


def split(model: nn.Module, mesh: Any) -> nn.Module:
    """The net in tensor parallelism.  Torch passes on uneven outputs as DTensors only."""
    plan = {
        "norm": SequenceParallel(use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(),
    }
    whole_inputs = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    return parallelize_module(parallelize_module(model, mesh, plan), mesh, whole_inputs)


def two_layers(rank: int) -> dict[str, np.ndarray]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    return by_adam(split(net(), mesh), [slice(0, 1), slice(1, 2)])


def over_fsdp(rank: int) -> dict[str, np.ndarray]:
    """Each half of the processes has half of the batch, and each process half of a half of each weight."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = rank // 2
    return by_adam(split(net(), mesh["tp"]), [slice(mine, mine + 1)], lambda model: fully_shard(model, mesh=mesh["dp"]))


def llama(rank: int, folder: Path, mask: Any) -> dict[str, np.ndarray]:
    """A model that transformers has distributed, or a whole one."""
    import os

    import transformers

    if dist.is_initialized():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(rank)}
        plan = transformers.distributed.DistributedConfig(tp_size=2, tp_plan="auto")
        model = transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=plan)
        assert hasattr(model.model.layers[0].mlp.up_proj.weight, "placements")
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tuner = train.attach(model, 0.1, mask)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # transformers takes the parts of the weights then
            logits = model(input_ids=ids).logits
    return {name: one.numpy().copy() for name, one in tuner.state_dict().items()} | {"logits": full(logits).numpy()}


def refusals(rank: int) -> list[str]:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = split(net(), mesh)
    before = dict(model.named_parameters())
    target = ["up.weight"]
    said = [
        refusal_of(train.attach, model, 0.3, "wm", target),
        refusal_of(train.attach, model, 0.3, "snip", target, [examples()[0]]),
        refusal_of(train.attach, model, 0.3, "rigsa", target, [examples()[0]]),
        refusal_of(train.attach, model, "1:4", "rand", target),
        refusal_of(train.attach, model, 0.3, "rand", target, prune_steps=2),
        refusal_of(train.attach, model, 0.3, "rand", target, magnitude=True),
        refusal_of(train.attach, model, 0.3, {"up.weight": [1, 2 + rank]}, target),
    ]
    model.up.weight = nn.Parameter(DTensor.from_local(torch.zeros(6, 8), mesh, [_StridedShard(0, split_factor=2)]))
    said.append(refusal_of(train.attach, model, 0.3, "rand", target))
    assert all(one is before[name] for name, one in model.named_parameters() if name != "up.weight")
    assert not hasattr(model, "_shiradelta")
    whole = net()
    tuner = train.attach(whole, 0.3, "rand")
    names = list(whole.state_dict())
    said.append(refusal_of(split, whole, mesh))
    assert list(whole.state_dict()) == names
    assert not any(isinstance(one, DTensor) for one in tuner.parameters() + list(tuner.weights.values()))
    tuner.detach()
    return said


def one_process_refuses(rank: int, folder: Path) -> list[str]:
    """What all say where one of two processes has other weights, another start, or cannot go on."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = split(net(), mesh)
    both = ["up.weight", "down.weight"]
    masks: list[dict[str, Any]] = [{"up.weight": [1, 2]}, {"down.weight": [1, 2]}]
    said = [
        refusal_of(train.attach, model, 0.3, masks[rank], both),
        refusal_of(train.attach, model, 0.3, masks[0] | masks[rank], both),
        refusal_of(train.attach, model, 0.3, {"norm.weight": [rank]}, ["norm.weight"]),  # whole in each process
    ]
    tuner = train.attach(model, 0.3, "rand", both)
    state = {name: torch.ones(len(one)) if "values" in name else one for name, one in tuner.state_dict().items()}
    tuner.load_state_dict(state)
    tuner.save(folder / "sound.shd")
    content = (folder / "sound.shd").read_bytes()  # the first process has written it, without a barrier
    said.append(refusal_of(tuner.save, folder / ("nowhere" if rank == 0 else ".") / "a.shd"))
    said.append(refusal_of(tuner.export, folder / "sound.shd" / "here" if rank == 0 else folder))
    assert not list(folder.glob("adapter*"))
    other = state | {"up.weight.values": state["up.weight.values"] + rank}
    short = state | ({"up.weight.values": torch.ones(1)} if rank == 1 else {})
    said += [refusal_of(tuner.load_state_dict, one) for one in (other, short)]
    assert all(torch.equal(one, state[name]) for name, one in tuner.state_dict().items())
    tuner.detach()
    said += [refusal_of(train.reattach, model, one) for one in (other, {} if rank == 1 else state)]
    own = folder / f"{rank}.shd"
    own.write_bytes(content[:-1] + bytes([content[-1] ^ rank]))  # one is damaged
    said.append(refusal_of(train.attach, model, 0.3, targets=both, start=own))
    assert not hasattr(model, "_shiradelta")
    return said


def lean(rank: int, folder: Path, gathers: bool) -> int:
    """A weight of 67 MB of which each process has a half: what training and saving take beside it at most."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    inputs = torch.ones(4, 4096)
    model(inputs).sum()
    before = forget_peak()
    tuner = train.attach(model, 0.001, "rand", "0")
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    model(inputs).square().sum().backward()
    optimizer.step()
    tuner.save(folder / "lean.shd", values="f32")
    if gathers:
        full(model[0].weight)
    most = peak() - before
    dist.barrier()
    with sd.open_delta(folder / "lean.shd") as delta:
        assert delta.nnz == tuner.nnz
    return most
