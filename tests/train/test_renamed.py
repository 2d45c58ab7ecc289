"""Names, keywords, options and states of 0.1, which are still taken."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shiradelta import train
from shiradelta.cli import main
from shiradelta.errors import ArgumentError
from shiradelta.nonzeros.saved_state import save_state
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.train import run as run_module
from shiradelta.train.run_state import load_run
from shiradelta.train.settings import TrainReport, TrainSettings
from tests.train.test_attach import llama, text_loss

TARGETS = ["q_proj", "down_proj"]


def trained(steps: int, **options: Any) -> train.Tuner:
    model = llama()
    tuner = train.attach(model, 0.02, "wm", TARGETS, **options)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        text_loss(model).backward()
        optimizer.step()
    return tuner


def test_attach_takes_its_old_keywords():
    with pytest.warns(DeprecationWarning, match="fall.* is deprecated; use prune_") as warned:
        old = trained(4, fall=4, fall_from=3)
    assert [Path(str(one.filename)).name for one in warned] == ["test_renamed.py"] * 2
    new = trained(4, prune_steps=4, prune_from=3)
    assert all(torch.equal(new.state_dict()[name], value) for name, value in old.state_dict().items())
    with pytest.raises(ArgumentError, match="the same argument"):
        trained(0, fall=4, prune_steps=4)


def test_tuner_fall_is_prune():
    tuner = trained(0)
    with pytest.warns(DeprecationWarning, match=r"use Tuner\.prune"):
        tuner.fall(3, 0.01, None)
    assert "prune_step" in tuner.state_dict()


def test_states_of_0_1_are_restored():
    """There the steps that pruning has done were called `fall`."""
    state = copy.deepcopy(trained(3, prune_steps=6).state_dict())
    steps = state.pop("prune_step")
    assert set(state) == {f"{name}.{part}" for name in trained(0).values for part in ("positions", "values", "kept")}
    tuner = trained(0, prune_steps=6)
    tuner.load_state_dict({**state, "fall": steps})
    assert tuner.state_dict()["prune_step"] == steps == 3
    assert all(torch.equal(tuner.state_dict()[name], value) for name, value in state.items())


def test_settings_and_report():
    with pytest.warns(DeprecationWarning, match="use TrainSettings"):
        settings = run_module.Settings
    with pytest.warns(DeprecationWarning, match="use TrainReport"):
        assert run_module.Report is TrainReport
    with pytest.warns(DeprecationWarning, match="is deprecated") as warned:
        old = settings(rate=0.1, fall_from=3, steps=7)
    assert [str(one.message) for one in warned] == [
        "fall_from is deprecated; use prune_from",
        "rate is deprecated; use relative_lr",
    ]
    assert old == TrainSettings(relative_lr=0.1, prune_from=3, steps=7) == replace(old)
    assert "say" not in inspect.signature(run_module.run).parameters
    with pytest.raises(AttributeError, match="Nothing"):
        _ = run_module.Nothing


def test_interrupted_runs_of_0_1_are_recognised():
    """By a digest of their settings, which has the old names in the old order."""
    names = ["sparsity", "mask", "targets", "scope", "avoid", "fall_from", "steps", "batch", "rate"]
    names += ["tokens", "seed", "values"]
    assert list(TrainSettings().as_of_0_1()) == names


def test_a_state_of_0_1_on_disk_has_its_base_in_the_metadata(tmp_path: Path):
    identity = ["model", TrainSettings().as_of_0_1()]
    unfinished = UnfinishedRun(tmp_path / "a.shd.train", identity)
    about = {"run": hashlib.sha256(json.dumps(identity).encode()).hexdigest(), "base": "digest"}
    save_state(unfinished.path, {"w.positions": torch.arange(3)}, {**about, "state": '{"step": 5, "history": []}'})
    found = load_run(unfinished, print)
    assert found is not None
    assert (found.step, found.base, list(found.mask)) == (5, "digest", ["w"])


def test_the_command_takes_its_old_options(tmp_path: Path):
    command = ["train", str(tmp_path), "--texts", "no.jsonl", "-o", str(tmp_path / "a.shd")]
    result = CliRunner().invoke(main, [*command, "--fall-from", "0.5", "--rate", "0.1"])
    assert result.exit_code == 2
    assert "use --prune-from" in result.stderr
    assert "use --relative-lr" in result.stderr
    assert "pruning from 0.5 x" in result.stderr
    shown = CliRunner().invoke(main, ["train", "--help"]).output
    assert "--fall-from" not in shown
    assert "--rate" not in shown
