"""What `verify` says is proven by the weights: states, undo deltas and digests that lie are noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import FormatError, TargetError
from shiradelta.folder.commit import commit
from shiradelta.folder.state import parse_state
from tests.scenes import contents

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def state(model: Path) -> Path:
    return model / ".shiradelta" / "state.json"


def relabel(model: Path, **fields: str) -> None:
    """Writes something else about the only delta, with a checksum that is right."""
    found = parse_state(state(model).read_bytes())
    (entry,) = found.applied
    state(model).write_bytes(replace(found, applied=(replace(entry, **fields),)).to_json())


def empty_undo(model: Path) -> None:
    """An undo delta that lists nothing, with the digest that the journal wants."""
    path = model / ".shiradelta" / "undo" / "0001.shd"
    shiradelta.save_delta(path, {})
    relabel(model, undo=hashlib.sha256(path.read_bytes()).hexdigest())


def other_undo(model: Path) -> None:
    path = model / ".shiradelta" / "undo" / "0001.shd"
    shiradelta.save_delta(path, {})


def change_state(model: Path) -> None:
    state(model).write_text(state(model).read_text().replace('"strength": 1.0', '"strength": 2.0'))


@pytest.mark.parametrize("lie", [lambda model: None, empty_undo, other_undo, change_state])
def test_a_plain_base_with_a_state_is_not_patched(model: Path, made: Path, lie: Callable[[Path], None], tmp_path: Path):
    patched = Path(shutil.copytree(model, tmp_path / "patched"))
    shiradelta.apply(patched, made / "a.shd")
    shutil.copytree(patched / ".shiradelta", model / ".shiradelta")
    lie(model)
    for delta in (None, made / "a.shd"):
        try:
            found = shiradelta.verify(model, delta).state
        except TargetError as error:
            found = str(error)
        assert found == "neither" or "is damaged" in found or "is not the undo delta" in found


def test_a_state_of_version_1_over_a_plain_base_is_not_patched(model: Path, made: Path):
    entry = {"id": 1, "file": "a.shd", "digest": "0" * 64, "strength": 1.0, "tensors": 6, "nonzeros": 700}
    (model / ".shiradelta" / "undo").mkdir(parents=True)
    found = {"version": 1, "applied": [{**entry, "replaced": [], "added": {}}], "pending": None}
    state(model).write_text(json.dumps(found))
    shiradelta.save_delta(model / ".shiradelta" / "undo" / "0001.shd", {})
    assert shiradelta.verify(model).state == "neither"


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_deltas_own_fingerprints_and_values_are_compared(model: Path, made: Path, tmp_path: Path, strength: float):
    """The journal of another delta, applied under this one's name and digest, does not pass for it."""
    shiradelta.apply(model, made / "b.shd", strength=strength)
    with shiradelta.open_delta(made / "a.shd") as delta:
        relabel(model, digest=delta.digest)
    report = shiradelta.verify(model, made / "a.shd")
    assert report.state == "neither"
    assert "model." in report.detail


@pytest.mark.parametrize("strength", [-0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_each_of_a_stack_is_verified_with_its_own_file(model: Path, made: Path, tmp_path: Path, strength: float):
    whole = tmp_path / "whole.shd"
    tensors = {
        "score.weight": TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new"),
        DOWN: TensorDelta((32, 96), None, [], op="drop"),
        UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0]),
    }
    shiradelta.save_delta(whole, tensors, values="f32")
    score = tmp_path / "score.shd"
    shiradelta.save_delta(score, {"score.weight": TensorDelta((2, 32), [3, 5], [1.0, 1.0])}, values="f32")
    deltas = [made / "a.shd", whole, score, made / "b.shd"]
    for delta in deltas[:3]:
        shiradelta.apply(model, delta, strength=1.0 if delta == whole else strength)
        for below in [None, *deltas[: deltas.index(delta) + 1]]:
            for full in (False, True):
                report = shiradelta.verify(model, below, full=full)
                assert report.state == "patched", report
    with pytest.raises(shiradelta.BaseMismatchError):
        shiradelta.apply(model, made / "b.shd")  # it changes the tensor that was dropped
    tensors_now = load_file(model / "model.safetensors")
    tensors_now["score.weight"] += 1
    save_file(tensors_now, model / "model.safetensors", metadata={"format": "pt"})
    assert shiradelta.verify(model).state == "neither"


def test_a_digest_that_is_another_deltas_is_refused(model: Path, made: Path, tmp_path: Path):
    """It would apply, pass for the other delta, and block the real one."""
    with shiradelta.open_delta(made / "b.shd") as other:
        digest = bytes.fromhex(other.digest)
    raw = bytearray((made / "a.shd").read_bytes())
    raw[80:112] = digest
    raw[124:128] = zlib.crc32(raw[:124]).to_bytes(4, "little")
    forged = tmp_path / "forged.shd"
    forged.write_bytes(raw)
    for act in (shiradelta.apply, shiradelta.verify):
        with pytest.raises(FormatError, match="digest_mismatch"):
            act(model, forged)
    shiradelta.apply(model, made / "b.shd")
    assert shiradelta.verify(model, made / "b.shd").state == "patched"


def test_nothing_recorded_is_unknown_and_the_last_revert_leaves_a_record(model: Path, made: Path):
    assert shiradelta.verify(model).state == "unknown"
    assert shiradelta.verify(model, made / "a.shd").state == "base"
    shiradelta.apply(model, made / "a.shd")
    shiradelta.revert(model)
    report = shiradelta.verify(model)
    assert report.state == "base"
    assert "SHA-256" in report.detail
    tensors = load_file(model / "model.safetensors")
    tensors[NORM] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = shiradelta.verify(model)
    assert (report.state, "model.safetensors" in report.detail) == ("neither", True)
    commit(model)
    assert shiradelta.verify(model).state == "base"
    commit(model, forget=True)
    assert shiradelta.verify(model).state == "unknown"
    assert [path.name for path in (model / ".shiradelta").iterdir() if path.name != "undo"] == ["lock"]


def test_full_compares_the_weights_that_no_delta_changes(model: Path, made: Path, tmp_path: Path):
    delta = tmp_path / "d.shd"
    shiradelta.save_delta(delta, {UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0])}, values="f32")
    shiradelta.apply(model, delta)
    assert shiradelta.verify(model, full=True).state == "patched"
    tensors = load_file(model / "model.safetensors")
    tensors[NORM] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert shiradelta.verify(model).state == "patched"
    assert shiradelta.verify(model, full=True).state == "neither"


def test_full_without_a_record_is_unknown(model: Path, made: Path):
    assert shiradelta.verify(model, made / "a.shd", full=True).state == "unknown"


def test_commit_makes_the_patched_weights_the_base(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    patched = contents(model)
    report = commit(model)
    assert [entry.file for entry in report.deltas] == ["a.shd"]
    assert contents(model) == patched
    assert shiradelta.verify(model).state == "base"
    with pytest.raises(TargetError, match="nothing to revert"):
        shiradelta.revert(model)
    assert not list((model / ".shiradelta" / "undo").iterdir())


def test_old_states_are_read_and_reverted(model: Path, made: Path):
    """Version 1 has no checksum and no digests."""
    base = contents(model)
    shiradelta.apply(model, made / "a.shd")
    found = json.loads(state(model).read_bytes())
    for field in ("before", "after", "undo"):
        del found["applied"][0][field]
    old = {"version": 1, "applied": found["applied"], "pending": None}
    state(model).write_text(json.dumps(old))
    assert shiradelta.verify(model, made / "a.shd").state == "patched"
    pending = Path(shutil.copytree(model, model.parent / "pending"))
    state(pending).write_text(json.dumps({**old, "applied": [], "pending": old["applied"][0]}))
    shiradelta.revert(model)
    assert contents(model) == base
    assert shiradelta.verify(pending).interrupted
    half = torch.zeros(96, 32, dtype=torch.bfloat16)
    whole = Path(shutil.copytree(pending, model.parent / "whole"))
    shiradelta.revert(whole)
    assert contents(whole) == base
    tensors = load_file(pending / "model.safetensors")
    save_file({**tensors, UP: half}, pending / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match="--force"):
        shiradelta.revert(pending)
    shiradelta.revert(pending, force=True)
