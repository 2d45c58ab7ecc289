"""RIGSA: the search against torch's AdamW on dense changes, pruning and rewinding, its memory, and the last pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import shiradelta
from shiradelta import train
from shiradelta.errors import ArgumentError, DeltaError, DivergedError
from shiradelta.nonzeros.gate import GATE
from shiradelta.nonzeros.schedule import cycle
from shiradelta.train import rigsa
from shiradelta.train.builtin_masks import DECAY
from shiradelta.train.mask_registry import seed_of
from tests.train.test_attach import BATCH, llama, text_loss

NAMES = ("0.weight", "2.weight")
TARGETS = ["q_proj", "down_proj"]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6)).to(dtype)


def data(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [(torch.randn(16, 12, generator=draw), torch.randn(16, 6, generator=draw)) for _ in range(count)]


def error(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def drawn(weight: Tensor, name: str) -> Tensor:
    """The random change of a weight, from its seed."""
    size = float(weight.square().mean().sqrt())
    generator = torch.Generator().manual_seed(seed_of(f"0 {name}"))
    return torch.randn(weight.numel(), generator=generator).mul_(size).view_as(weight)


def reference(share: float) -> dict[str, Tensor]:
    """The masks, by torch's own autograd and AdamW on changes of all elements."""
    model, batches = net(), data()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    kept = {name: torch.ones_like(weights[name]) for name in NAMES}
    for number in range(rigsa.ROUNDS):
        changes = {name: (drawn(weights[name], name) * kept[name]).requires_grad_() for name in NAMES}
        gates = {name: torch.tensor(GATE).requires_grad_() for name in NAMES}
        groups: list[dict[str, Any]] = []
        for name in NAMES:
            size = float(weights[name].square().mean().sqrt())
            groups.append({"params": [changes[name]], "lr": rigsa.LR * size, "weight_decay": DECAY / size})
            groups.append({"params": [gates[name]], "lr": rigsa.GATE_LR, "weight_decay": DECAY})
        optimizer = torch.optim.AdamW(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step, batch in enumerate(batches):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cycle(step, len(batches))
            made = {name: weights[name] + gates[name] * changes[name] * kept[name] for name in NAMES}
            optimizer.zero_grad()
            error(lambda x, made=made: functional_call(model, {**weights, **made}, (x,)), batch).backward()
            optimizer.step()
        for name in NAMES:
            start, change = drawn(weights[name], name), changes[name].detach()
            score = change.abs() / change.abs().max() + (change.sign() == start.sign())
            score = torch.where(kept[name] > 0, score, -1).view(-1)
            numel = score.numel()
            count = round(numel * (round(share * numel) / numel) ** ((number + 1) / rigsa.ROUNDS))
            kept[name] = torch.zeros(numel).index_fill(0, score.topk(count).indices, 1).view_as(kept[name])
    return {name: one.view(-1).nonzero().view(-1) for name, one in kept.items()}


@pytest.mark.slow
def test_the_search_is_adamw_on_a_dense_change(monkeypatch: pytest.MonkeyPatch):
    """In float32, so that rounding decides nothing."""
    monkeypatch.setattr(rigsa, "_HELD", torch.float32)
    monkeypatch.setattr(rigsa, "_rounded", lambda values, noise: values)
    monkeypatch.setattr(rigsa, "LR", 0.3)  # so that some signs change
    monkeypatch.setattr(rigsa, "GATE_LR", 0.2)
    monkeypatch.setattr(rigsa, "_BLOCK", 50)
    model = net()
    tuner = train.attach(model, 0.1, "rigsa", ["0", "2"], data(), loss=error)
    wanted = reference(0.1)
    assert tuner.positions.keys() == wanted.keys()
    for name, where in wanted.items():
        start = drawn(net().state_dict()[name], name).view(-1)
        assert torch.equal(tuner.positions[name], where)
        assert set(where.tolist()) != set(start.abs().topk(len(where)).indices.tolist())  # training has a say
        torch.testing.assert_close(tuner.values[name].data, start[where])
        assert tuner.scales[name].tolist() == pytest.approx([GATE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_back_after_the_search(dtype: torch.dtype):
    for fails in (False, True):
        model = net(dtype)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        calls = 0

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], fails: bool = fails) -> Tensor:
            nonlocal calls
            calls += 1
            found = error(model, (batch[0].to(dtype), batch[1].to(dtype)))
            return found * math.nan if fails and calls == 7 else found

        if fails:
            with pytest.raises(DivergedError, match="gave NaN"):
                train.attach(model, 0.1, "rigsa", ["0", "2"], data(), loss=loss)
        else:
            train.attach(model, 0.1, "rigsa", ["0", "2"], data(), loss=loss).detach()
            assert calls == rigsa.ROUNDS * len(data())
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nine_bytes_an_element_of_a_model_in_bfloat16():
    weight = nn.Parameter(torch.randn(40, 50).bfloat16())
    layer = rigsa._Layer(weight, 20, DECAY, "seed", None)
    held = [one for one in vars(layer).values() if isinstance(one, Tensor) and one is not weight]
    assert sum(one.numel() * one.element_size() for one in held) == 9 * weight.numel()


def test_rounding_keeps_the_mean():
    values = torch.full((1 << 16,), 1 + 2**-12)
    noise = torch.arange(1 << 16, dtype=torch.int32)
    found = rigsa._rounded(values, noise)
    assert found.dtype == torch.bfloat16
    assert float(found.double().mean()) == pytest.approx(1 + 2**-12, rel=1e-6)
    exact = torch.tensor([0.0, -1.5, 2.0**-100])
    assert torch.equal(rigsa._rounded(exact, torch.full((3,), (1 << 16) - 1, dtype=torch.int32)).float(), exact)


def trained(model: nn.Module, tuner: train.Tuner, steps: int, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = text_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_file_is_an_ordinary_delta_of_what_was_trained(dtype: torch.dtype, tmp_path: Path):
    model = llama(dtype)
    model.save_pretrained(tmp_path / "model")
    tuner = train.attach(model, 0.05, "rigsa", TARGETS, [BATCH] * 3)
    losses = trained(model, tuner, 8)
    assert losses[-1] < losses[0]
    tuner.save(tmp_path / "task.shd", values="f32")
    with shiradelta.open_delta(tmp_path / "task.shd") as delta:
        assert delta.metadata["mask"] == "rigsa"
        for name, tensor in delta.items():
            wanted = tuner.scales[name].detach() * tuner.values[name].detach()
            assert torch.equal(torch.tensor(tensor.values()), wanted)
    shiradelta.apply(tmp_path / "model", tmp_path / "task.shd")
    weights, bits = dict(model.named_parameters()), torch.int32 if dtype == torch.float32 else torch.int16
    for name, stored in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(stored.view(bits), weights[name].data.view(bits))


def test_gradients_reach_values_and_gate():
    """Against autograd on a dense weight."""
    model = llama()
    tuner = train.attach(model, 0.1, "rigsa", TARGETS, [BATCH])
    with torch.no_grad():
        for scales in tuner.scales.values():
            scales.fill_(0.3)
    tuner.write()
    text_loss(model).backward()
    dense = llama()
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, where in tuner.positions.items():
            weights[name].view(-1)[where] += 0.3 * tuner.values[name]
    text_loss(dense).backward()
    for name, where in tuner.positions.items():
        gradient = weights[name].grad.view(-1)[where]
        torch.testing.assert_close(tuner.values[name].grad, 0.3 * gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(tuner.scales[name].grad, (gradient * tuner.values[name]).sum().detach().view(1))


@pytest.mark.slow
def test_a_state_goes_on_without_another_search():
    model = llama()
    tuner = train.attach(model, 0.05, "rigsa", TARGETS, [BATCH] * 2)
    trained(model, tuner, 2)
    state = {name: one.clone() for name, one in tuner.state_dict().items()}
    other = llama()
    resumed = train.reattach(other, state, "rigsa")
    assert trained(model, tuner, 3) == trained(other, resumed, 3)
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in tuner.state_dict().items())
    resumed.detach()
    assert all(torch.equal(weight, llama().state_dict()[name]) for name, weight in other.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [False, True])
def test_reattaching_to_other_states(magnitude: bool):
    model = llama()
    tuner = train.attach(model, 0.05, "wm", TARGETS, magnitude=magnitude)
    trained(model, tuner, 2)
    state = tuner.state_dict()
    other = llama()
    with train.reattach(other, state):
        assert text_loss(other).item() == text_loss(model).item()
    name = next(iter(tuner.values))
    with pytest.raises(ArgumentError, match=r"none of Tuner\.state_dict"):
        train.reattach(other, {"x": torch.zeros(3)})
    with pytest.raises(ArgumentError, match="does not fit the model"):
        train.reattach(other, state | {f"{name}.positions": torch.tensor([10**6]), f"{name}.values": torch.zeros(1)})
    where = state[f"{name}.positions"]
    for odd in (where - 10**6, where.flip(0), where.float(), where > 3, where[None], where[:0], [1, 2]):
        with pytest.raises(ArgumentError, match="does not fit the model"):
            train.reattach(other, state | {f"{name}.positions": odd})  # type: ignore[operator]
    with pytest.raises(DeltaError, match="does not fit"):
        train.reattach(other, state | {f"{name}.values": torch.zeros(1)})
    assert not hasattr(other, "_shiradelta")
    pruned = llama()
    with_steps = train.attach(pruned, 0.05, "wm", TARGETS, prune_steps=3)
    with pytest.raises(ArgumentError, match="attach with prune_steps"):
        train.reattach(other, with_steps.state_dict())


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ArgumentError, match="'rigsa' trains values behind a gate instead; leave magnitude out"):
        train.attach(llama(), 0.1, "rigsa", TARGETS, [BATCH], magnitude=True)
    with pytest.raises(ArgumentError, match="'rigsa' gives tickets, not scores"):
        train.attach(llama(), "1:8", "rigsa", TARGETS, [BATCH])
