"""Training a model whose layers are on two devices; the second one is `tests.second_device`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shiradelta
from shiradelta.models.placement import place
from shiradelta.train import attach, attaching
from tests.models.test_placement import CPU, META, llama
from tests.second_device import second_device

IDS = torch.randint(0, 60, (4, 3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _the_second_device_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors count as plain ones, and autocast knows it."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and enabled(device))
    monkeypatch.setattr(attaching, "check_weights", lambda model, weights: None)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().to(logits.device))


def trained(model: nn.Module, out: Path, settings: dict[str, Any]) -> tuple[list[float], set[torch.device]]:
    tuner = attach(model, 0.05, calibration=list(IDS), loss=loss, **settings)
    optimizer, losses = torch.optim.AdamW(tuner.parameters(), lr=1e-2), []
    for ids in (*IDS, *IDS):
        optimizer.zero_grad()
        found = loss(model, ids)
        found.backward()
        nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        optimizer.step()
        losses.append(found.item())
    tuner.save(out)
    return losses, {values.device for values in tuner.parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": "grad"},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"mask": "rand"},
                {"mask": "snip", "scope": "model"},
                {"mask": "rand", "magnitude": True},
                {"mask": "rand", "prune_steps": 6, "prune_from": 5},
            )
        ),
    ],
    ids=str,
)
def test_values_are_beside_their_weights_and_train_as_on_one_device(settings: dict[str, Any], tmp_path: Path):
    torch.manual_seed(0)
    expected, devices = trained(llama(), tmp_path / "one.shd", settings)
    assert devices == {CPU}
    torch.manual_seed(0)
    model = llama()
    with second_device():
        found, devices = trained(place(model, [CPU, META]), tmp_path / "two.shd", settings)
    assert devices == {CPU, META}
    assert found == pytest.approx(expected, rel=1e-2)
    with shiradelta.open_delta(tmp_path / "one.shd") as one, shiradelta.open_delta(tmp_path / "two.shd") as two:
        assert {name: len(one[name].positions()) for name in one} == {name: len(two[name].positions()) for name in two}
