"""The learning rate that short runs find."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from shiradelta import train
from shiradelta.train.probe import FACTOR, FIRST, MOST, Probe


def probe(scale: float, loss: Callable[[Tensor], Tensor] | None = None) -> tuple[Probe, nn.Linear]:
    """A linear layer whose outputs have to grow by `scale` of its weights' RMS."""
    torch.manual_seed(0)
    model = nn.Linear(32, 16, bias=False)
    weight = model.weight.detach().clone()
    inputs = torch.randn(64, 32)
    tuner = train.attach(model, 1.0, "wm")
    wanted = inputs @ (weight + scale * weight.square().mean().sqrt() * torch.randn(weight.shape).sign()).T

    def error(part: Sequence[int]) -> Tensor:
        left = (model(inputs[list(part)]) - wanted[list(part)]).square().mean()
        return left if loss is None else loss(left)

    rms = float(weight.square().mean().sqrt())
    batches = [list(range(start, start + 8)) for start in range(0, 48, 8)]
    return Probe(tuner, [rms], error, batches, [list(range(48, 64))], 1e9), model


@pytest.mark.parametrize(("scale", "least", "most"), [(0.01, 0.001, 0.02), (0.6, 0.04, 1.6)])
def test_a_larger_change_takes_a_larger_rate(scale: float, least: float, most: float):
    assert least < probe(scale)[0].best() < most


def test_the_values_are_zero_again_and_the_weights_the_base():
    found, model = probe(0.1)
    before = model.weight.detach().clone()
    found.best()
    assert all(not values.any() and values.grad is None for values in found.tuner.parameters())
    assert torch.equal(model.weight, before)


def test_the_rate_above_the_one_whose_neighbours_are_worse_is_taken():
    found, _ = probe(0.1)
    losses: dict[float, float] = {}
    taken = found.best(losses.__setitem__)
    best = min(losses, key=losses.__getitem__)
    assert taken == pytest.approx(best * FACTOR)
    for neighbour in (taken, best / FACTOR):
        assert any(math.isclose(neighbour, rate) for rate in losses)


def test_a_rate_that_diverges_is_not_taken():
    found, _ = probe(0.1)
    losses: dict[float, float] = {}
    above = losses[found.best(losses.__setitem__)]

    def diverging(left: Tensor) -> Tensor:
        return left if torch.is_grad_enabled() or left < above else left * math.inf

    found, _ = probe(0.1, diverging)
    assert found.best() == min(losses, key=losses.__getitem__)


def test_runs_that_diverge_take_the_least_rate():
    found, _ = probe(0.1, lambda left: left * math.nan)
    assert found.best() == pytest.approx(FIRST / FACTOR**MOST)
