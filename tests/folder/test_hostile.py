"""Folders that were tampered with, changed underneath, or cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import TargetError
from shiradelta.folder.weights import WeightFiles
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.directory import Directory
from tests.conftest import read
from tests.scenes import contents, weights

UP = "model.layers.0.mlp.up_proj.weight"


def change(model: Path, name: str) -> None:
    """Adds one to a tensor, behind the tool's back."""
    tensors = load_file(model / "model.safetensors")
    tensors[name] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A delta that adds a whole tensor."""
    new = TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new")
    shiradelta.save_delta(tmp_path / "head.shd", {"score.weight": new})
    return tmp_path / "head.shd"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replaced", ["../victim.safetensors"]),
        ("replaced", ["/etc/victim.safetensors"]),
        ("replaced", ["config.json"]),
        ("replaced", [".shiradelta/x.safetensors"]),
        ("replaced", ["a\\..\\x.safetensors"]),
        ("replaced", 3),
        ("id", "../../1"),
        ("id", -1),
        ("id", True),
        ("file", 7),
        ("strength", "1"),
        ("added", {"x": "y"}),
        ("added", {"x": 3}),
        ("surplus", 1),
    ],
)
def test_a_state_from_elsewhere_reaches_nothing_outside(model: Path, made: Path, field: str, value: object):
    (model.parent / "victim.safetensors").write_bytes(b"precious")
    shiradelta.apply(model, made / "a.shd")
    path = model / ".shiradelta" / "state.json"
    state = json.loads(path.read_text())
    state["pending"] = {**state["applied"][0], field: value}
    path.write_text(json.dumps(state))
    payload = model / ".shiradelta" / "undo" / "0001"
    payload.mkdir()
    (payload / "victim.safetensors").write_bytes(b"evil")
    for action in (shiradelta.verify, shiradelta.revert):
        with pytest.raises(TargetError, match=r"state\.json: is damaged"):
            action(model)
    assert (model.parent / "victim.safetensors").read_bytes() == b"precious"


def test_a_linked_state_is_refused(model: Path, made: Path, tmp_path: Path):
    shiradelta.apply(model, made / "a.shd")
    (model / ".shiradelta").rename(tmp_path / "elsewhere")
    (model / ".shiradelta").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="is a link"):
        shiradelta.revert(model)


def test_a_lost_undo_folder_is_one_plain_error(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    shutil.rmtree(model / ".shiradelta" / "undo")
    with pytest.raises(TargetError, match="is missing"):
        shiradelta.revert(model)


def test_weights_that_changed_since_are_not_reverted_in_silence(model: Path, made: Path):
    base = contents(model)
    shiradelta.apply(model, made / "a.shd")
    change(model, UP)
    with pytest.raises(TargetError, match=f"{UP}.*--force"):
        shiradelta.revert(model)
    assert shiradelta.verify(model).state == "neither"
    shiradelta.revert(model, force=True)
    at = np.setdiff1d(np.arange(96 * 32), shiradelta.open_delta(made / "a.shd")[UP].positions())
    assert not np.array_equal(read(model, UP)[at], read(made / "bf16", UP)[at])
    assert set(contents(model)) == set(base)


def test_another_model_in_the_same_place_is_noticed(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    save_file({"other": torch.zeros(3)}, model / "model.safetensors")
    before = weights(model)
    for force in (False, True):
        with pytest.raises(TargetError, match="is gone"):
            shiradelta.revert(model, force=force)
    assert weights(model) == before


def test_added_tensors_are_verified_too(model: Path, head: Path):
    copy = Path(shutil.copytree(model, model.parent / "copy"))
    shiradelta.apply(copy, head)
    assert shiradelta.verify(copy).state == "patched"
    change(copy, "score.weight")
    report = shiradelta.verify(copy)
    assert (report.state, "score.weight" in report.detail) == ("neither", True)


def test_a_patched_copy_without_state_is_recognised(model: Path, head: Path):
    assert shiradelta.verify(model, head).state == "base"
    shiradelta.apply(model, head)
    shutil.rmtree(model / ".shiradelta")
    assert shiradelta.verify(model, head).state == "patched"


@pytest.mark.slow
def test_ctrl_c_during_a_revert_is_held_back(model: Path, made: Path):
    """A real SIGINT in the middle of the writing."""
    base = contents(model)
    shiradelta.apply(model, made / "a.shd")
    code = (
        "import os, signal, sys, shiradelta\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with it ignored
        "def tell(what, done, total):\n"
        "    if what == 'patching' and done == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "shiradelta.revert(sys.argv[1], progress=tell)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, check=False)
    assert child.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)
    assert contents(model) == base


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_holes_of_sparse_files_are_filled_first(model: Path):
    path = model / "model.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}}).encode()
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 20))
    if path.stat().st_blocks * 512 >= path.stat().st_size:
        pytest.skip("this file system has no sparse files")
    with Directory(model) as folder, WeightFiles(folder, [path.name]) as files:
        files.reserve_space()
    assert path.stat().st_blocks * 512 >= path.stat().st_size


AS_A_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@pytest.mark.slow
@pytest.mark.skipif(
    os.name == "nt" or (os.geteuid() == 0 and not shutil.which("setpriv")), reason="root writes anywhere"
)
def test_read_only_models_can_be_copied_and_verified(model: Path, made: Path, tmp_path: Path):
    prefix = AS_A_USER if os.geteuid() == 0 else []
    (model / "model.safetensors").chmod(0o444)
    model.chmod(0o555)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-m", "shiradelta.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        refused = run("apply", model, made / "a.shd")
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
        copied = run("apply", model, made / "a.shd", "--out", tmp_path / "copy")
        assert copied.returncode == 0, copied.stderr
        (tmp_path / "copy" / ".shiradelta").chmod(0o555)
        assert "patched" in run("verify", tmp_path / "copy").stdout
    finally:
        model.chmod(0o755)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]


def test_other_weight_files_beside_are_named(model: Path, made: Path):
    shutil.copy(model / "model.safetensors", model / "model.fp16.safetensors")
    report = shiradelta.apply(model, made / "a.shd")
    assert any("model.fp16.safetensors" in warning for warning in report.warnings)


def test_a_pipeline_is_its_components_whatever_lies_beside(tmp_path: Path, model: Path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    shutil.copy(model / "model.safetensors", pipeline / "model.safetensors")
    assert all(name.startswith("unet/") for name in open_checkpoint(pipeline))
