"""Folders whose record is lost, or is not of the present weights: never is a patched model taken for a base."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import TargetError
from shiradelta.folder.commit import commit
from shiradelta.folder.listing import recorded
from shiradelta.util.directory import Directory
from tests.scenes import weights

DROPPED = "model.layers.1.mlp.down_proj.weight"
ACTIONS: dict[str, Callable[[Path, Path], object]] = {
    "apply": shiradelta.apply,
    "apply without checks": lambda model, delta: shiradelta.apply(model, delta, check=False),
    "apply --out": lambda model, delta: shiradelta.apply(model, delta, model.parent / "out"),
    "revert": lambda model, delta: shiradelta.revert(model),
    "revert --force": lambda model, delta: shiradelta.revert(model, force=True),
    "list": lambda model, delta: recorded(model),
}


def state_of(model: Path) -> Path:
    return model / ".shiradelta" / "state.json"


def drop(path: Path) -> Path:
    """A delta that changes no element, but removes a tensor."""
    shiradelta.save_delta(path, {DROPPED: TensorDelta((32, 96), None, [], op="drop")})
    return path


@pytest.mark.parametrize("kind", ["elements", "whole tensors"])
@pytest.mark.parametrize("action", ACTIONS)
def test_deltas_without_their_state_are_noticed(model: Path, made: Path, tmp_path: Path, action: str, kind: str):
    base = weights(model)
    shiradelta.apply(model, made / "a.shd" if kind == "elements" else drop(tmp_path / "drop.shd"))
    patched = weights(model)
    state_of(model).rename(tmp_path / "state.json")
    with pytest.raises(TargetError, match=r"model: its \.shiradelta has no state\.json, and undo/0001.* put it back"):
        ACTIONS[action](model, made / "b.shd")
    report = shiradelta.verify(model)
    assert (report.state, "no state.json" in report.detail) == ("unknown", True)
    assert weights(model) == patched
    shutil.copy(tmp_path / "state.json", state_of(model))
    shiradelta.revert(model)
    assert weights(model) == base


def test_a_damaged_undo_delta_without_a_state_is_noticed(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    state_of(model).unlink()
    (model / ".shiradelta" / "undo" / "0001.shd").write_bytes(b"damaged")
    with pytest.raises(TargetError, match=r"no state\.json"):
        shiradelta.apply(model, made / "b.shd")


def test_a_commit_takes_the_present_weights_all_the_same(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    state_of(model).unlink()
    commit(model)
    assert shiradelta.verify(model).state == "base"
    shiradelta.apply(model, made / "b.shd", check=False)


def test_what_was_saved_before_the_first_record_is_no_delta(model: Path, made: Path, tmp_path: Path):
    """A command that was killed after its undo delta, or after new files were written beside it."""
    base = weights(model)
    shiradelta.apply(model, made / "a.shd")
    shutil.copytree(model / ".shiradelta" / "undo", tmp_path / "undo")
    shiradelta.revert(model)
    commit(model, forget=True)
    shutil.copytree(tmp_path / "undo", model / ".shiradelta" / "undo", dirs_exist_ok=True)
    (model / ".shiradelta" / "undo" / "0001").mkdir()
    (model / ".shiradelta" / "undo" / "0001" / "model.safetensors.new").write_bytes(b"new")
    assert not state_of(model).exists()
    assert shiradelta.verify(model).detail.startswith("nothing is recorded")
    shiradelta.apply(model, made / "b.shd")
    shiradelta.revert(model)
    assert weights(model) == base


def test_weights_that_changed_since_the_last_revert_are_no_base(model: Path, made: Path, tmp_path: Path):
    other = tmp_path / "other.shd"
    shiradelta.save_delta(other, {DROPPED: TensorDelta((32, 96), [1, 2], [1.0, -1.0])})
    shiradelta.apply(model, made / "a.shd")
    shiradelta.revert(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.norm.weight"] += 1  # the other delta does not change it
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    changed = weights(model)
    with pytest.raises(TargetError, match=r"model\.safetensors: is not as the last revert.*`shiradelta commit`"):
        shiradelta.apply(model, other)
    assert weights(model) == changed
    shiradelta.apply(model, other, check=False)
    shiradelta.revert(model)
    commit(model)
    shiradelta.apply(model, other)
    shiradelta.revert(model)
    assert weights(model) == changed


def test_forgetting_leaves_no_undo_delta_without_a_state(model: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    shiradelta.apply(model, made / "a.shd")
    real = Directory.remove

    def refuse(folder: Directory, name: str, depth: int = 8) -> None:
        if name == "0001.shd":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder, name, depth)

    monkeypatch.setattr(Directory, "remove", refuse)
    commit(model, forget=True)
    monkeypatch.undo()
    shiradelta.apply(model, made / "b.shd", check=False)
    assert [entry.file for entry in recorded(model).applied] == ["b.shd"]
    commit(model, forget=True)
    assert not state_of(model).exists()
    assert not os.listdir(model / ".shiradelta" / "undo")
