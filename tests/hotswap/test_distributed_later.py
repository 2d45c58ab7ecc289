"""Models that are distributed while adapters are on them: `revert` puts the base back in all processes, or in none."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shiradelta import HotSwap
from shiradelta.errors import TargetError
from tests import BRIEF
from tests.hotswap.ranks_at_random import DELTAS, Net, delta, net, spread, whole
from tests.hotswap.test_ranks import own, refusal_of
from tests.ranks import Ended, run
from tests.swapping import adapter, bits, random_delta

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard") or not dist.is_gloo_available():
    pytest.skip("torch has no FSDP2 here", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def mesh(*names: str) -> Any:
    count = dist.get_world_size()
    shape = (count,) if len(names) == 1 else (2, count // 2)
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def by_fsdp(model: Net) -> None:
    fsdp.fully_shard(model.up, mesh=mesh("dp"))
    fsdp.fully_shard(model, mesh=mesh("dp"))


def in_part(model: Net) -> None:
    """One layer only, with a bias that stays as it is."""
    fsdp.fully_shard(model.up, mesh=mesh("dp"), ignored_params={model.up.bias})


def with_copies(model: Net) -> None:
    fsdp.fully_shard(model, mesh=mesh("copies", "dp"))


def by_tensors(model: Net) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh("tp"), {"up": ColwiseParallel(), "down": RowwiseParallel()})


def by_both(model: Net) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    both = mesh("dp", "tp")
    parallelize_module(model, both["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fsdp.fully_shard(model, mesh=both["dp"])


def with_adapters(model: Any, backend: str = "auto", timeout: float = 30) -> tuple[HotSwap, dict[str, np.ndarray]]:
    """A session with three adapters on a model, which change some elements twice; and the base's bits."""
    state = net().state_dict()
    base = {name: bits(one) for name, one in state.items()}
    swap = HotSwap(model, backend=backend, timeout=timeout)
    for number, (name, op) in enumerate(DELTAS.items()):
        swap.load(name, delta(number, op, state))
    swap.switch({"one": 0.5, "two": -1.0, "set": 1.0})
    return swap, base


def distributed(rank: int, how: Callable[[Net], None], backend: str) -> None:
    model = net()
    swap, base = with_adapters(model, backend)
    target = {name: bits(one) for name, one in model.state_dict().items()}
    how(model)
    assert any(hasattr(one, "full_tensor") for one in model.parameters())
    assert all(np.array_equal(now, target[name]) for name, now in whole(model).items())
    refused = refusal_of(swap.switch, "one")
    assert "was replaced by a DTensor since" in refused
    report = swap.revert()
    assert (report.active, swap.active, swap.nbytes > 0) == ({}, {}, True)
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())
    assert "was distributed since this HotSwap was made; make a new" in refusal_of(swap.switch, "one")
    again, _ = with_adapters(model)
    assert all(np.array_equal(now, target[name]) for name, now in whole(model).items())
    again.revert()
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())


@pytest.mark.parametrize(
    ("how", "count", "backend"),
    [
        (by_fsdp, 2, "auto"),
        (by_fsdp, 4, "numpy"),
        (in_part, 2, "torch"),
        (with_copies, 4, "auto"),
        (by_tensors, 2, "torch"),
        (by_tensors, 4, "auto"),
        (by_both, 4, "auto"),
    ],
)
def test_the_base_is_put_back(how: Callable[[Net], None], count: int, backend: str, tmp_path: Path):
    """The sizes of the net are such that processes have more, fewer or no rows."""
    run(distributed, count, tmp_path, how, backend)


def over_tensors(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    two = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = net()
    parallelize_module(model, two["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    swap, base = with_adapters(model)
    target = whole(model)
    fsdp.fully_shard(model, mesh=two["dp"])
    assert all(np.array_equal(now, target[name]) for name, now in whole(model).items())
    swap.revert()
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())


def test_a_model_that_was_tensor_parallel_before(tmp_path: Path):
    run(over_tensors, 4, tmp_path)


class Tied(torch.nn.Module):
    """An embedding and an output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(7, 6), torch.nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight


def tied(rank: int, how: str) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Tied()
    base = bits(model.out.weight)
    swap = HotSwap(model, timeout=30)
    data = adapter({"embed.weight": random_delta((7, 6), 11, 1, "float32", base=model.out.weight)})
    swap.load("a", data)
    with swap.applied("a"):
        assert not np.array_equal(bits(model.out.weight), base)
        if how == "fsdp":
            fsdp.fully_shard(model, mesh=mesh("dp"))
        else:
            plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "out": ColwiseParallel()}
            parallelize_module(model, mesh("tp"), plan)
            assert model.out.weight is not model.embed.weight
    assert all(np.array_equal(now, base) for now in whole(model).values())


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_tied_weights_that_are_two_now(how: str, tmp_path: Path):
    run(tied, 2, tmp_path, how)


def refused(rank: int) -> list[str]:
    model = net()
    swap, base = with_adapters(model)
    by_fsdp(model)
    target = whole(model)
    model.unshard()
    said = [refusal_of(swap.revert)]
    model.reshard()
    with torch.no_grad():  # one element that an adapter has changed, of one process
        part = own(model.up.weight)
        at = int(np.flatnonzero(target["up.weight"] != base["up.weight"])[0])
        if rank == 0:
            kept = part.view(-1)[at].clone()
            part.view(-1)[at] = 7
    said.append(refusal_of(swap.revert))
    if rank == 0:
        part.view(-1)[at] = kept
    assert swap.active == {"one": 0.5, "two": -1.0, "set": 1.0}
    assert all(np.array_equal(now, target[name]) for name, now in whole(model).items())
    swap.revert()
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())
    return said


def test_what_is_refused_changes_nothing(tmp_path: Path):
    for gathered, changed in run(refused, 2, tmp_path):
        assert gathered.startswith("TargetError: tensor 'down.weight' is a copy that FSDP2 has gathered")
        assert gathered.endswith("call reshard() first")
        assert changed.startswith("TargetError: the weights were changed since the model was distributed")


def other_calls(rank: int) -> list[str]:
    model = net()
    swap, base = with_adapters(model)
    by_fsdp(model)
    target = whole(model)
    x = torch.ones(2, model.up.in_features, dtype=torch.bfloat16)
    calls = [
        swap.changed,
        swap.rebase,
        lambda: swap.load("new", delta(0, "add", net().state_dict())),
        lambda: swap.selftest(lambda: model.up(x)),
        swap.applied(None).__enter__,
    ]
    said = [refusal_of(call) for call in calls]
    assert swap.active == {"one": 0.5, "two": -1.0, "set": 1.0}
    assert all(np.array_equal(now, target[name]) for name, now in whole(model).items())
    swap.revert()
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())
    return said


def test_other_calls_change_nothing_and_name_revert(tmp_path: Path):
    """`selftest` looks at the base, for which it took the adapters out for good."""
    for every in run(other_calls, 2, tmp_path):
        assert len(every) == 5
        for said in every:
            assert "was replaced by a DTensor since HotSwap looked at the model; if adapters are active, call" in said


def cast(rank: int) -> str:
    model = net()
    swap, _ = with_adapters(model)
    model.float()
    by_fsdp(model)
    return refusal_of(swap.revert)


def test_weights_that_were_cast(tmp_path: Path):
    for said in run(cast, 2, tmp_path):
        assert said.startswith("TargetError: the weights were changed since the model was distributed, or are")
        assert said.endswith("; load the model's weights again")


def others(rank: int) -> list[str]:
    """One process has another strength, writes the tensors before they are distributed, or has no adapter."""
    said = []
    for case in ("strength", "written"):
        model = net()
        swap, _ = with_adapters(model)
        if rank == 1:
            if case == "strength":
                swap.switch("one", 0.25)
            else:
                with torch.no_grad():
                    model.up.bias.add_(1)
        by_fsdp(model)
        before = whole(model)
        said.append(refusal_of(swap.revert))
        assert all(np.array_equal(now, before[name]) for name, now in whole(model).items())
        assert swap.active
    return said


def test_where_one_process_refuses_none_changes(tmp_path: Path):
    one, two = run(others, 2, tmp_path)
    assert all(said[0].startswith("TargetError: the weights were changed since") for said in (one, two))
    assert two[1].startswith("TargetError: tensor 'up.bias' was changed from outside")
    assert one[1].startswith("TargetError: rank 1 refuses revert(), so that no rank changes: TargetError: tensor 'up.b")


def killed(rank: int, seed: int) -> None:
    base = {name: bits(own(one)) for name, one in spread("fsdp").state_dict().items()}
    model = net()
    swap, _ = with_adapters(model, timeout=1)
    fsdp.fully_shard(model, mesh=mesh("dp"))
    target = {name: bits(own(one)) for name, one in model.state_dict().items()}
    if rank == 1:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(0, 0.08))
    with suppress(TargetError):
        swap.revert()
    if rank == 1:
        signal.pause()
    now = {name: bits(own(one)) for name, one in model.state_dict().items()}
    assert all(np.array_equal(now[name], part) for name, part in (target if swap.active else base).items())


@pytest.mark.parametrize("seed", range(2 if BRIEF else 6))
def test_a_process_that_is_killed_leaves_base_or_target(seed: int, tmp_path: Path):
    one, two = run(killed, 2, tmp_path, seed)
    assert (one, type(two)) == (None, Ended)


def stacked(rank: int, base: Path, data: bytes) -> None:
    """Experts are one weight in memory, of which each tensor of the checkpoint is a piece."""
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {name: bits(one) for name, one in model.state_dict().items()}
    swap = HotSwap(model, timeout=30)
    swap.load("a", data)
    swap.switch("a")
    assert any(target.view for target in swap._weights.targets)
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh("dp"))
    fsdp.fully_shard(model, mesh=mesh("dp"))
    assert any(not np.array_equal(now, before[name]) for name, now in whole(model).items())
    swap.revert()
    assert all(np.array_equal(now, before[name]) for name, now in whole(model).items())


def test_pieces_of_weights_are_put_back(tmp_path: Path):
    pytest.importorskip("transformers", minversion="5.0")
    from tests.hotswap.test_forms import Case, mixtral

    torch.manual_seed(0)
    case = Case(mixtral().to(torch.bfloat16), tmp_path)
    run(stacked, 2, tmp_path, tmp_path / "base", case.delta(1))
