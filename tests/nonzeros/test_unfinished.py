"""The state of an interrupted run on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shiradelta.errors import SourceError
from shiradelta.nonzeros import unfinished
from shiradelta.nonzeros.unfinished import UnfinishedRun


def test_a_state_comes_back_to_the_same_run_only(tmp_path: Path):
    path, told = tmp_path / "state", list[str]()
    run = UnfinishedRun(path, ["a", 1])
    assert run.load(told.append) is None
    assert not told
    tensors, numbers = {"values": torch.arange(3.0).bfloat16()}, {"step": 3, "history": [[1, 0.5]], "best": math.inf}
    run.save(tensors, numbers)
    found = UnfinishedRun(path, ["a", 1]).load(told.append)
    assert found is not None
    assert torch.equal(found[0]["values"], tensors["values"])
    assert found[1] == numbers
    assert not told
    assert UnfinishedRun(path, ["a", 2]).load(told.append) is None
    assert told == [f"{path} belongs to a run with other settings or inputs; starting anew"]
    run.remove()
    run.remove()
    assert not path.exists()


def test_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "state"
    for about in (None, {"run": "key"}, {"run": "key", "state": "no json"}, {"run": "key", "state": "3"}):
        save_file({}, path, about)
        with pytest.raises(SourceError, match="not the state of an unfinished run; move it away"):
            UnfinishedRun(path, []).load(print)


def test_states_are_saved_only_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = UnfinishedRun(tmp_path / "state", [])
    assert not run.is_due()
    monkeypatch.setattr(unfinished, "SAVE_EVERY", -1)
    assert run.is_due()
