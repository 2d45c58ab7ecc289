"""Density that falls while an adapter is trained: how many are left, which, and what an optimizer knows of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shiradelta
from shiradelta import pruning, train
from shiradelta.errors import DeltaError
from tests.test_train import BATCH, image_loss, llama, make, text_loss

ADAMW = torch.optim.AdamW
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": ADAMW,
    "SGD with momentum": lambda values, lr: torch.optim.SGD(values, lr, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


def falling(model: nn.Module, **options: Any) -> train.Tuner:
    options = {"sparsity": 0.02, "mask": "wm", "fall": 6, "fall_from": 4, **options}
    return train.attach(model, targets=["q_proj", "down_proj"], calibration=[BATCH], **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = text_loss(model)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_what_matters_least_goes_and_the_optimizer_keeps_the_rest(name: str):
    model = llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuner = falling(model)
    first, parameters = dict(tuner.positions), tuner.parameters()
    optimizer = OPTIMIZERS[name](parameters, lr=0.01)
    for done in range(1, 9):
        values = {name: own.detach().clone() for name, own in tuner.values.items()}
        held = {name: dict(zip(at.tolist(), range(len(at)), strict=True)) for name, at in tuner.positions.items()}
        step(model, optimizer)
        left = max(0, 1 - done / 6) ** 3
        for tensor, own in tuner.values.items():
            weight = dict(model.named_parameters())[tensor]
            end = round(0.02 * weight.numel())
            assert len(own) == end + round((round(0.08 * weight.numel()) - end) * left)
            assert own.grad is not None
            assert own.grad.shape == own.shape
            state = [t for t in optimizer.state[own].values() if torch.is_tensor(t) and t.dim()]
            assert state
            assert all(t.shape == own.shape for t in state)
            at = tuner.positions[tensor]
            assert torch.isin(at, first[tensor]).all()
            moved = own.detach() - values[tensor][[held[tensor][p] for p in at.tolist()]]
            assert moved.abs().max() < 0.05  # values stayed at their positions
    assert [id(p) for p in tuner.parameters()] == [id(p) for p in parameters]
    tuner.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_score_is_the_value_times_the_rms_gradient():
    """Nothing that stays matters less than what goes; elsewhere the weights are the base's."""
    model = llama()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuner = falling(model, fall=4)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    twin_model = copy.deepcopy(model)
    twin = twin_model.__dict__["_shiradelta"]
    twin._falling = None  # the same, and nothing goes
    reference = ADAMW(twin.parameters(), lr=0.01)
    step(model, optimizer)
    step(twin_model, reference)
    for name, own in twin.values.items():
        score = own.detach().abs() * reference.state[own]["exp_avg_sq"].sqrt()
        stays = torch.isin(twin.positions[name], tuner.positions[name])
        assert 0 < int((~stays).sum())
        assert score[stays].min() >= score[~stays].max()
        changed = (model.state_dict()[name] != base[name]).reshape(-1).nonzero()[:, 0]
        assert torch.isin(changed, tuner.positions[name]).all()
        assert torch.equal(tuner.values[name], own[stays])


def test_over_the_model_nonzeros_move_between_tensors():
    model = llama()
    tuner = falling(model, scope="model", mask="snip")
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    for _ in range(7):
        step(model, optimizer)
    assert tuner.nnz == sum(round(0.02 * weight.numel()) for weight in tuner.weights.values())
    shares = [len(own) / tuner.weights[name].numel() for name, own in tuner.values.items()]
    assert max(shares) > 1.1 * min(shares)


def test_other_weights_than_linear_ones():
    model, targets, _ = make("image")
    tuner = train.attach(model, 0.1, "rand", targets, fall=3)
    optimizer = ADAMW(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        image_loss(model).backward()
        optimizer.step()
    assert all(len(own) == max(1, round(0.1 * tuner.weights[name].numel())) for name, own in tuner.values.items())


def test_a_resumed_run_falls_on_exactly(tmp_path: Path):
    def begin() -> tuple[nn.Module, train.Tuner, torch.optim.Optimizer]:
        model = llama()
        tuner = falling(model)
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
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert sum(tensor.nnz for tensor in delta.values()) == tuner.nnz
    with pytest.raises(DeltaError, match="'fall' is on one side only"):
        train.attach(llama(), 0.02, "wm", ["q_proj", "down_proj"]).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "struct"}, "a mask that can be larger"),
        ({"sparsity": "1:64"}, "a mask that can be larger"),
        ({"mask": {"model.layers.0.self_attn.q_proj.weight": torch.arange(4)}}, "a mask that can be larger"),
        ({"fall_from": 1}, "from above 1 x"),
        ({"fall": -3}, "1 step or more"),
    ],
)
def test_falls_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(DeltaError, match=message):
        falling(llama(), **options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = llama()
    tuner = falling(model)
    optimizer = ADAMW(tuner.parameters(), lr=0.01)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(DeltaError, match="several processes"):
        step(model, optimizer)


def test_descent_in_numbers():
    descent = pruning.Descent(10, [100, 50], [10, 5], False)
    assert [descent.is_due(done) for done in (0, 1, 9, 10, 12)] == [False, True, True, True, True]
    score = torch.rand(150, generator=torch.Generator().manual_seed(0))
    kept = descent.kept(5, score, [100, 50])
    assert [int(part.sum()) for part in kept.split([100, 50])] == [10 + round(90 / 8), 5 + round(45 / 8)]
    assert int(pruning.Descent(10, [100, 50], [10, 5], True).kept(11, score, [100, 50]).sum()) == 15
    # Where no gradient comes, magnitude tells.
    values = torch.tensor([0.1, -3.0, 2.0])
    assert pruning.matter(values, torch.zeros(3)).argsort().tolist() == [0, 2, 1]
    assert torch.equal(pruning.matter(values, None), values.abs())
