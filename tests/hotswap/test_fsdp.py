"""Models that FSDP2 has distributed: nothing is written that `reshard()` would throw away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shiradelta import HotSwap
from shiradelta.errors import TargetError
from shiradelta.train import attach
from tests.swapping import adapter, bits, formula, random_delta

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard") or not dist.is_gloo_available():
    pytest.skip("torch has no FSDP2 here", allow_module_level=True)

pytestmark = pytest.mark.slow  # a group of processes takes seconds to begin

NAMES = ("0.weight", "1.0.weight", "1.0.bias")
DATA = adapter(
    {name: random_delta((8, 8) if "weight" in name else (8,), 3, i, "float32") for i, name in enumerate(NAMES)}
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Sequential(torch.nn.Linear(8, 8)))


@pytest.fixture
def model(mesh: object) -> torch.nn.Sequential:
    """Of its three tensors, FSDP2 ignores the bias."""
    whole = net()
    for part in (whole[1], whole):
        fsdp.fully_shard(part, mesh=mesh, ignored_params={whole[1][0].bias})
    return whole


@pytest.mark.parametrize("backend", ["auto", "numpy", "torch"])
@pytest.mark.parametrize("how", ["unshard", "forward"])
@pytest.mark.parametrize("lists", [True, False], ids=["", "another release of torch"])
def test_gathered_weights_are_refused_by_name(
    model: torch.nn.Sequential, how: str, backend: str, lists: bool, monkeypatch: pytest.MonkeyPatch
):
    if how == "unshard":
        model.unshard()
    else:
        with torch.no_grad():
            model(torch.eye(8))  # the outer module keeps its weights
    assert type(model[0].weight) is torch.nn.Parameter
    if not lists:
        monkeypatch.setattr(type(model), "_get_fsdp_state", lambda self: object())
    with pytest.raises(TargetError, match=r"'0\.weight' is a copy that FSDP2 has gathered, which reshard\(\) throws"):
        HotSwap(model, backend=backend).load("a", DATA)
    with pytest.raises(TargetError, match=r"'0\.weight' is a copy that FSDP2"):
        HotSwap({"part": model}, names=lambda name: f"part/{name}", backend=backend).load("a", DATA)


def test_shards_are_switched(model: torch.nn.Sequential):
    before = {
        name: bits(tensor.to_local() if name in NAMES[:2] else tensor) for name, tensor in model.state_dict().items()
    }
    for _ in range(2):
        swap = HotSwap(model)
        swap.load("a", DATA)
        swap.switch("a")
        for name, tensor in model.state_dict().items():
            now = bits(tensor.to_local() if name in NAMES[:2] else tensor)
            assert np.array_equal(now, formula(before[name], "float32", [(DATA, 1)], name))
        model.unshard()
        with pytest.raises(TargetError, match=r"is a copy that FSDP2 has gathered.*; call reshard\(\) first"):
            swap.revert()
        model.reshard()
        swap.revert()
        assert swap.changed() == 0
    with torch.no_grad():
        model[0].weight.add_(1)  # counted by the DTensor, not by its part
    with pytest.raises(TargetError, match=r"tensor '0\.weight' was changed from outside"):
        swap.switch("a")
    swap.rebase(check=False)
    with torch.no_grad():
        model[0].weight.to_local().add_(1)
    with pytest.raises(TargetError, match=r"tensor '0\.weight' was changed from outside"):
        swap.switch("a")


def test_a_model_that_is_distributed_after_loading(mesh: object):
    model = net()
    swap = HotSwap(model)
    swap.load("a", DATA)
    fsdp.fully_shard(model, mesh=mesh)
    for gather in (model.reshard, model.unshard):
        gather()
        with pytest.raises(TargetError, match=r"was (moved or replaced|replaced by a DTensor)"):
            swap.switch("a")
    assert swap.active == {}


def test_training_is_refused_by_name(model: torch.nn.Sequential):
    before = model.state_dict(keep_vars=True)
    with pytest.raises(TargetError, match=r"'.+weight' is sharded by FSDP2.*; attach to the whole model, then call fu"):
        attach(model, 0.5)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_values_cannot_be_made_tensor_parallel(mesh: object):
    """docs/distributed.md says so."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    attach(model, 0.5)
    before = dict(model.named_parameters())
    with pytest.raises(TargetError, match=r"'weight' is in a layer with values that are trained.*attach to that"):
        parallelize_module(model, mesh, {"1.0": ColwiseParallel()})
    with pytest.raises(RuntimeError, match="leaf tensor"):  # torch's own
        parallelize_module(model, mesh, {"1.0": RowwiseParallel()})
    assert all(one is before[name] for name, one in model.named_parameters())


def test_tensor_parallel_weights_that_fsdp_gathers_are_refused(mesh: object):
    """They are DTensors then, too."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    both = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = net()
    parallelize_module(model, both["tp"], {"0": ColwiseParallel()})
    fsdp.fully_shard(model, mesh=both["dp"])
    model.unshard()
    with pytest.raises(TargetError, match=r"'0\.weight' is a copy that FSDP2 has gathered"):
        HotSwap(model).load("a", DATA)
    with pytest.raises(TargetError, match=r"'0\.weight' is a copy that FSDP2 has gathered.*then call fully_shard"):
        attach(model, 0.5)
    model.reshard()
    swap = HotSwap(model)
    swap.load("a", DATA)
    swap.switch("a")
    swap.revert()
    with pytest.raises(TargetError, match=r"'0\.weight' is sharded by FSDP2"):
        attach(model, 0.5)
