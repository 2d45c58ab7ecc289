"""Pruning while an adapter is trained: how many nonzeros are left, which, and what an optimizer sees of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shiradelta as sd
from shiradelta import train
from shiradelta.errors import DeltaError
from shiradelta.nonzeros import pruning
from tests.train.test_attach import BATCH, image_loss, llama, make, text_loss

ADAMW = torch.optim.AdamW
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": ADAMW,
    "SGD with momentum": lambda values, lr: torch.optim.SGD(values, lr, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


def pruned(model: nn.Module, **options: Any) -> train.Tuner:
    options = {"sparsity": 0.02, "mask": "wm", "prune_steps": 6, "prune_from": 4, **options}
    return train.attach(model, targets=["q_proj", "down_proj"], calibration=[BATCH], **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = text_loss(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(**options: Any) -> tuple[nn.Module, train.Tuner]:
    """Trained until the mask is final."""
    model = llama()
    tuner = pruned(model, **options)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    for _ in range(7):
        step(model, optimizer)
    return model, tuner


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))


def train_two_layers(model: nn.Module, tuner: train.Tuner) -> None:
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 100)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_nonzeros_are_pruned_and_the_base_is_restored_there(name: str):
    model = llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuner = pruned(model)
    mask, parameters = dict(tuner.positions), tuner.parameters()
    sizes = [len(own) for own in parameters]
    optimizer = OPTIMIZERS[name](parameters, lr=0.01)
    for done in range(1, 9):
        step(model, optimizer)
        left = max(0, 1 - done / 6) ** 3
        for tensor, at in tuner.positions.items():
            weight = tuner.weights[tensor]
            end = round(0.02 * weight.numel())
            assert len(at) == end + round((round(0.08 * weight.numel()) - end) * left)
            assert torch.isin(at, mask[tensor]).all()
            changed = (weight != before[tensor]).reshape(-1).nonzero()[:, 0]
            assert torch.isin(changed, at).all()
            assert len(changed) > 0.9 * len(at)
            mask[tensor] = at
    assert [len(own) for own in parameters] == sizes
    assert tuner.nnz == sum(map(len, mask.values()))
    tuner.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_least_important_are_pruned():
    """By |value| x RMS gradient; the others are as if nothing had been pruned."""
    model = llama()
    tuner = pruned(model, prune_steps=4)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    twin_model = copy.deepcopy(model)
    twin = twin_model.__dict__["_shiradelta"]
    twin._pruner = None
    reference = ADAMW(twin.parameters(), lr=0.01)
    step(model, optimizer)
    step(twin_model, reference)
    for name, own in twin.values.items():
        score = own.detach().abs() * reference.state[own]["exp_avg_sq"].sqrt()
        stays = torch.isin(twin.positions[name], tuner.positions[name])
        assert int((~stays).sum()) > 0
        assert score[stays].min() >= score[~stays].max()
        assert torch.equal(tuner.values[name], own.where(stays, 0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_that_keeps_the_last_loss_and_a_compiled_graph(compiled: bool, tmp_path: Path):
    """A graph that is alive still knows the parameters' sizes; a compiled one is compiled once, not at each pruning."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a second

    model = llama()
    tuner = pruned(model, prune_steps=12)
    graphs = CompileCounterWithBackend("aot_eager")
    optimizer, run = ADAMW(model.parameters(), lr=0.01), torch.compile(model, backend=graphs) if compiled else model
    for _ in range(14):
        loss = run(**BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert graphs.frame_count == int(compiled)
    counts = [round(0.02 * weight.numel()) for weight in tuner.weights.values()]
    assert [len(at) for at in tuner.positions.values()] == counts
    assert [int(own.grad.count_nonzero()) for own in tuner.parameters() if own.grad is not None] == counts
    weights = {name: weight.clone() for name, weight in tuner.weights.items()}
    tuner.save(tmp_path / "a.shd", "f32")
    tuner.detach()
    sd.HotSwap(model).load("a", tmp_path / "a.shd")
    again = train.attach(model, targets=["q_proj", "down_proj"], start=tmp_path / "a.shd")
    assert all(torch.equal(weight, weights[name]) for name, weight in again.weights.items())


def test_pruned_weights_are_the_base_again_after_others_have_overwritten_them():
    """A state dict of the model, from before the pruning."""
    model = llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuner = pruned(model)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    for _ in range(2):
        step(model, optimizer)
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    state = copy.deepcopy(tuner.state_dict())
    for _ in range(6):
        step(model, optimizer)
    now = tuner.state_dict()
    model.load_state_dict(earlier)
    tuner.load_state_dict(state)
    assert all(torch.equal(weight, earlier[name]) for name, weight in model.state_dict().items() if name in before)
    tuner.load_state_dict(now)
    model.load_state_dict({name: earlier[name] for name in before}, strict=False)
    text_loss(model)  # a forward pass writes what is trained, and the base where nothing is
    for name, weight in tuner.weights.items():
        changed = (weight != before[name]).reshape(-1).nonzero()[:, 0]
        assert torch.isin(changed, tuner.positions[name]).all()
    tuner.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_over_the_model_nonzeros_move_between_tensors():
    model, tuner = trained(scope="model", mask="snip")
    targets = [p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "down_proj.weight"))]
    assert tuner.nnz == round(0.02 * sum(weight.numel() for weight in targets))
    assert [len(at) for at in tuner.positions.values()] != [round(0.02 * p.numel()) for p in tuner.weights.values()]


def test_other_weights_than_linear_ones():
    model, targets, _ = make("image")
    tuner = train.attach(model, 0.2, "rand", targets, prune_steps=3)
    optimizer = ADAMW(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        image_loss(model).backward()
        optimizer.step()
    assert all(len(at) == max(1, round(0.2 * tuner.weights[name].numel())) for name, at in tuner.positions.items())


def test_a_resumed_run_prunes_on_exactly(tmp_path: Path):
    def begin() -> tuple[nn.Module, train.Tuner, torch.optim.Optimizer]:
        model = llama()
        tuner = pruned(model)
        return model, tuner, ADAMW(tuner.parameters(), lr=0.01)

    model, tuner, optimizer = begin()
    losses = [step(model, optimizer) for _ in range(3)]
    state, known = copy.deepcopy(tuner.state_dict()), copy.deepcopy(optimizer.state_dict())
    losses += [step(model, optimizer) for _ in range(5)]
    again, other, second = begin()
    other.load_state_dict(state)
    second.load_state_dict(known)
    assert [step(again, second) for _ in range(5)] == losses[3:]
    for one, two in zip(tuner.values.values(), other.values.values(), strict=True):
        assert torch.equal(one, two)
    tuner.save(tmp_path / "a.shd", "f32")
    with sd.open_delta(tmp_path / "a.shd") as delta:
        assert sum(tensor.nnz for tensor in delta.values()) == tuner.nnz
    with pytest.raises(DeltaError, match="a run that prunes"):
        train.attach(llama(), 0.02, "wm", ["q_proj", "down_proj"]).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "struct"}, "a mask that can be larger"),
        ({"sparsity": "1:64"}, "a mask that can be larger"),
        ({"mask": {"model.layers.0.self_attn.q_proj.weight": torch.arange(4)}}, "a mask that can be larger"),
        ({"prune_from": 1}, "from above 1 x"),
        ({"prune_steps": -3}, "1 step or more"),
        ({"prune_steps": 0}, "1 step or more"),
        ({"sparsity": 0.0001}, "a sparsity of 0.0001 leaves tensor"),
    ],
)
def test_pruning_that_is_impossible(options: dict[str, Any], message: str):
    with pytest.raises(DeltaError, match=message):
        pruned(llama(), **options)


def test_shards_of_values_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = llama()
    tuner = pruned(model)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    monkeypatch.setattr("shiradelta.train.pruning.is_sharded", lambda values: True)
    with pytest.raises(DeltaError, match="without FSDP"):
        step(model, optimizer)


def test_peft_gets_what_was_kept(tmp_path: Path):
    model, tuner = trained()
    tuner.save_peft(tmp_path)
    positions = {name: at.tolist() for name, at in tuner.positions.items()}
    tuner.detach()
    again = train.attach(model, targets=["q_proj", "down_proj"], start=tmp_path)
    for name, values in again.values.items():
        assert again.positions[name][values != 0].tolist() == positions[name]


def test_the_schedule_in_numbers():
    schedule = pruning.PruningSchedule(10, [100, 50], [10, 5], False)
    assert [pruning.is_due(done, 10) for done in (0, 1, 9, 10, 12)] == [False, True, True, True, True]
    score = torch.rand(150, generator=torch.Generator().manual_seed(0))
    scores = [score[:100], score[100:]]
    for mask, own, count in zip(schedule.kept(5, scores), scores, [10 + round(90 / 8), 5 + round(45 / 8)], strict=True):
        assert int(mask.sum()) == count
        assert own[mask].min() > own[~mask].max()
    assert sum(int(mask.sum()) for mask in pruning.PruningSchedule(10, [100, 50], [10, 5], True).kept(11, scores)) == 15
    # Where no gradient comes, magnitude tells.
    values = torch.tensor([0.1, -3.0, 2.0])
    assert pruning.importance(values, torch.zeros(3)).argsort().tolist() == [0, 2, 1]
    assert torch.equal(pruning.importance(values, None), values.abs())


def test_a_share_of_all_weights_also_where_the_mask_leaves_some_out():
    model = two_layers()
    with torch.no_grad():
        model[1].weight *= 1e-3
    tuner = train.attach(model, 0.02, "wm", ["0", "1"], scope="model", prune_steps=3)
    assert len(tuner.values) == 1
    train_two_layers(model, tuner)
    assert tuner.nnz == 400


def test_a_tensor_that_has_too_few_does_not_stop_the_others():
    model = two_layers()
    taken = {"0.weight": torch.arange(5, 10_000)}
    tuner = train.attach(model, 0.02, "wm", ["0", "1"], avoid=[taken], prune_steps=3)
    train_two_layers(model, tuner)
    assert [len(at) for at in tuner.positions.values()] == [5, 200]


def test_one_optimizer_has_all_values():
    model = llama()
    tuner = pruned(model)
    optimizer = ADAMW(tuner.parameters()[:2], lr=0.01)
    with pytest.raises(DeltaError, match="give them to one"):
        step(model, optimizer)


def test_values_that_others_have_averaged_are_masked_in_the_file(tmp_path: Path):
    _, tuner = trained()
    with torch.no_grad():
        for own in tuner.parameters():
            own += 1
    tuner.save(tmp_path / "a.shd")
    with sd.open_delta(tmp_path / "a.shd") as delta:
        assert sum(tensor.nnz for tensor in delta.values()) == tuner.nnz
