"""apply, revert and verify on folders: exact, all or nothing, and told apart from what they are not for."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import BaseMismatchError, DeltaError, FormatError, SourceError, TargetError
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.revert import revert_all
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.files import system_error
from tests.conftest import random_tensors, read, write_model
from tests.killing import VICTIMS, kill_repeatedly
from tests.scenes import check_report, contents, preload, weights, write_inputs

UP = "model.layers.0.mlp.up_proj.weight"


def expected_bits(base: Path, delta: Path, name: str, strength: float = 1.0) -> np.ndarray:
    """W + alpha v by torch, tensor by tensor."""
    bits = read(base, name).copy()
    with shiradelta.open_delta(delta) as opened:
        tensor = opened[name]
        at = tensor.positions()
        weight = torch.from_numpy(bits[at].view(np.int16)).view(torch.bfloat16)
        s = torch.from_numpy(tensor.values().copy()) * torch.tensor(strength, dtype=torch.float32)
        bits[at] = (weight.float() + s).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits


@pytest.mark.parametrize("kind", ["bf16", "sharded"])
@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
def test_apply_is_the_formula_and_revert_restores_every_file(made: Path, tmp_path: Path, kind: str, strength: float):
    model = Path(shutil.copytree(made / kind, tmp_path / "model"))
    before = contents(model)
    report = shiradelta.apply(model, made / "a.shd", strength=strength)
    assert report.tensors == 6
    for name in random_tensors(torch.bfloat16):
        assert np.array_equal(read(model, name), expected_bits(made / kind, made / "a.shd", name, strength))
    assert shiradelta.verify(model).state == "patched"
    shiradelta.revert(model)
    assert contents(model) == before


@pytest.mark.usefixtures("no_threads")
def test_apply_and_revert_where_no_thread_can_be_started(model: Path, made: Path):
    before = contents(model)
    shiradelta.apply(model, made / "a.shd")
    assert shiradelta.verify(model, full=True).state == "patched"
    shiradelta.revert(model)
    assert contents(model) == before


def test_stack_of_deltas_is_reverted_in_turn(model: Path, made: Path):
    states = [contents(model)]
    for name in ("a.shd", "b.shd"):
        shiradelta.apply(model, made / name)
        states.append({k: v for k, v in contents(model).items() if not k.startswith(".")})
    assert len(shiradelta.verify(model).applied) == 2
    shiradelta.revert(model)
    assert {k: v for k, v in contents(model).items() if not k.startswith(".")} == states[1]
    shiradelta.revert(model)
    assert contents(model) == states[0]


def test_out_writes_a_patched_copy_and_leaves_the_base(model: Path, made: Path, tmp_path: Path):
    before = contents(model)
    shiradelta.apply(model, made / "a.shd", out=tmp_path / "patched")
    assert contents(model) == before
    assert np.array_equal(read(tmp_path / "patched", UP), expected_bits(made / "bf16", made / "a.shd", UP))
    shiradelta.revert(tmp_path / "patched")
    assert contents(tmp_path / "patched") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "patched"]


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
def test_linked_weights_are_never_written_in_place(model: Path, made: Path, tmp_path: Path, make: str):
    original = tmp_path / "blob"
    (model / "model.safetensors").rename(original)
    getattr(model / "model.safetensors", make)(original)
    before = original.read_bytes()
    with pytest.raises(TargetError, match="--out"):
        shiradelta.apply(model, made / "a.shd")
    assert original.read_bytes() == before
    assert not (model / ".shiradelta").exists()
    shiradelta.apply(model, made / "a.shd", out=tmp_path / "copy")
    assert original.read_bytes() == before
    assert not (tmp_path / "copy" / "model.safetensors").is_symlink()


def test_applying_twice_is_noticed(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    once = contents(model)
    with pytest.raises(TargetError, match="applied already"):
        shiradelta.apply(model, made / "a.shd")
    assert contents(model) == once


def test_patched_elsewhere_is_noticed(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    shutil.rmtree(model / ".shiradelta")
    with pytest.raises(BaseMismatchError, match="applied before"):
        shiradelta.apply(model, made / "a.shd")
    assert shiradelta.verify(model, made / "a.shd").state == "patched"


def test_wrong_base_is_refused_before_the_first_write(made: Path, tmp_path: Path):
    other = write_model(tmp_path / "other", random_tensors(torch.bfloat16, seed=9))
    before = contents(other)
    with pytest.raises(BaseMismatchError, match=r"fingerprint .* --no-check"):
        shiradelta.apply(other, made / "a.shd")
    assert contents(other) == before
    assert shiradelta.verify(other, made / "a.shd").state == "neither"
    shiradelta.apply(other, made / "a.shd", check=False)
    shiradelta.revert(other)
    assert contents(other) == before


def test_one_altered_tensor_is_named(model: Path, made: Path):
    tensors = load_file(model / "model.safetensors")
    tensors[UP] += 1
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(BaseMismatchError, match=UP):
        shiradelta.apply(model, made / "a.shd")


def test_base_in_another_dtype_is_named_with_its_option(made: Path, tmp_path: Path):
    model = Path(shutil.copytree(made / "f32", tmp_path / "model"))
    with pytest.raises(BaseMismatchError, match=r"float32 .* bfloat16 .* --allow-dtype"):
        shiradelta.apply(model, made / "a.shd")
    shiradelta.apply(model, made / "a.shd", allow_dtype=True)
    shiradelta.revert(model)
    assert contents(model) == contents(made / "f32")


def test_names_that_are_not_there(model: Path, tmp_path: Path):
    shiradelta.save_delta(tmp_path / "d.shd", {"nowhere.weight": TensorDelta((4,), [1], [1.0])})
    with pytest.raises(BaseMismatchError, match="0 of 1 tensor found in"):
        shiradelta.apply(model, tmp_path / "d.shd")


def test_one_prefix_is_bridged(model: Path, tmp_path: Path):
    tensor = TensorDelta((96, 32), [5], [1.0])
    shiradelta.save_delta(tmp_path / "d.shd", {f"base.{UP}": tensor}, values="f32")
    shiradelta.apply(model, tmp_path / "d.shd")
    assert shiradelta.verify(model).state == "patched"


def test_shape_that_does_not_fit(model: Path, tmp_path: Path):
    shiradelta.save_delta(tmp_path / "d.shd", {UP: TensorDelta((32, 96), [5], [1.0])})
    with pytest.raises(BaseMismatchError, match=r"\[96, 32\].*\[32, 96\]"):
        shiradelta.apply(model, tmp_path / "d.shd")


def test_tied_output_embedding_is_written_once(model: Path, tmp_path: Path):
    tensor = TensorDelta((64, 32), [7, 9], [1.0, 2.0])
    both = {"lm_head.weight": tensor, "model.embed_tokens.weight": tensor}
    shiradelta.save_delta(tmp_path / "d.shd", both, values="f32")
    before = read(model, "model.embed_tokens.weight").copy()
    shiradelta.apply(model, tmp_path / "d.shd")
    after = read(model, "model.embed_tokens.weight")
    assert np.flatnonzero(before != after).tolist() == [7, 9]
    shiradelta.revert(model)
    other = {**both, "lm_head.weight": TensorDelta((64, 32), [8], [1.0])}
    shiradelta.save_delta(tmp_path / "e.shd", other, values="f32")
    with pytest.raises(BaseMismatchError, match="tied"):
        shiradelta.apply(model, tmp_path / "e.shd")


def test_set_takes_strength_one_only(model: Path, tmp_path: Path):
    tensor = TensorDelta((96, 32), [5], np.array([0x3F80], np.uint16), dtype="bfloat16", op="set")
    shiradelta.save_delta(tmp_path / "d.shd", {UP: tensor})
    with pytest.raises(DeltaError, match="strength"):
        shiradelta.apply(model, tmp_path / "d.shd", strength=0.5)
    shiradelta.apply(model, tmp_path / "d.shd")
    assert read(model, UP)[5] == 0x3F80


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39])
def test_strength_that_is_not_finite(model: Path, made: Path, strength: float):
    with pytest.raises(DeltaError, match="strength"):
        shiradelta.apply(model, made / "a.shd", strength=strength)


@pytest.mark.parametrize("kind", ["bf16", "sharded"])
def test_new_and_dropped_tensors(made: Path, tmp_path: Path, kind: str):
    model = Path(shutil.copytree(made / kind, tmp_path / "model"))
    before = contents(model)
    gone = "model.layers.1.mlp.down_proj.weight"
    deltas = {
        "score.weight": TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new"),
        gone: TensorDelta((32, 96), None, [], op="drop"),
        UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0]),
    }
    shiradelta.save_delta(tmp_path / "d.shd", deltas, values="f32")
    report = shiradelta.apply(model, tmp_path / "d.shd")
    assert (report.added, report.dropped) == (1, 1)
    assert read(model, "score.weight").tolist() == list(range(64))
    with pytest.raises(KeyError):
        read(model, gone)
    assert np.array_equal(read(model, UP), expected_bits(made / kind, tmp_path / "d.shd", UP))
    assert (
        read(model, "model.layers.0.norm.weight").tolist() == read(made / kind, "model.layers.0.norm.weight").tolist()
    )
    if kind == "sharded":
        weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
        assert "score.weight" in weight_map
        assert gone not in weight_map
    assert shiradelta.verify(model).state == "patched"
    shiradelta.revert(model)
    assert contents(model) == before


EMBED = "model.embed_tokens.weight"


def replacement(model: Path, rows: int, base_fingerprint: int | None = None) -> TensorDelta:
    """The embeddings with another number of rows, in another dtype."""
    checkpoint = open_checkpoint(model)
    known = PastBits(checkpoint[EMBED]).fingerprint() if base_fingerprint is None else base_fingerprint
    shape = (rows, *checkpoint[EMBED].shape[1:])
    bits = np.arange(rows * shape[1], dtype=np.uint32)
    return TensorDelta(shape, None, bits, "float32", "replace", base_fingerprint=known)


@pytest.mark.parametrize("kind", ["bf16", "sharded"])
def test_a_replaced_tensor(made: Path, tmp_path: Path, kind: str):
    """It takes the place of one of any shape and dtype, in the same file, and the original comes back."""
    model = Path(shutil.copytree(made / kind, tmp_path / "model"))
    before, file = contents(model), open_checkpoint(model)[EMBED].file
    rows = open_checkpoint(model)[EMBED].shape[0] + 3
    tensors = {EMBED: replacement(model, rows), UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0])}
    shiradelta.save_delta(tmp_path / "d.shd", tensors, values="f32")
    assert shiradelta.verify(model, tmp_path / "d.shd").state == "base"
    report = shiradelta.apply(model, tmp_path / "d.shd")
    assert (report.added, report.dropped, report.tensors) == (1, 1, 1)
    assert (slot := open_checkpoint(model)[EMBED]).shape[0] == rows
    assert slot.file == file
    assert np.array_equal(open_checkpoint(model).bits(EMBED), tensors[EMBED].bits())
    assert shiradelta.verify(model).state == shiradelta.verify(model, tmp_path / "d.shd").state == "patched"
    shutil.rmtree(model / ".shiradelta")
    assert shiradelta.verify(model, tmp_path / "d.shd").state == "patched"
    shutil.rmtree(model)
    shutil.copytree(made / kind, model)
    shiradelta.apply(model, tmp_path / "d.shd")
    shiradelta.revert(model)
    assert contents(model) == before


@pytest.mark.parametrize("op", ["replace", "drop"])
def test_a_tensor_that_goes_is_the_base_s(model: Path, tmp_path: Path, op: str):
    tensor = replacement(model, 5, base_fingerprint=1)
    if op == "drop":
        slot = open_checkpoint(model)[EMBED]
        tensor = TensorDelta(slot.shape, None, None, slot.dtype.name, op, base_fingerprint=1)
    shiradelta.save_delta(tmp_path / "d.shd", {EMBED: tensor})
    with pytest.raises(BaseMismatchError, match="is not the one that the delta was made against"):
        shiradelta.apply(model, tmp_path / "d.shd")
    assert shiradelta.verify(model, tmp_path / "d.shd").state == "neither"


def test_deltas_below_and_on_top_of_a_replaced_tensor(model: Path, tmp_path: Path):
    """What an earlier delta has changed in the tensor that went says nothing of the one that came."""
    before = contents(model)
    base = open_checkpoint(model)
    first = TensorDelta(base[EMBED].shape, [0, base[EMBED].numel - 1], [1.0, 1.0], base[EMBED].dtype.name)
    shiradelta.save_delta(tmp_path / "1.shd", {EMBED: first}, values="f32")
    shiradelta.apply(model, tmp_path / "1.shd")
    shiradelta.save_delta(tmp_path / "2.shd", {EMBED: replacement(model, 2)})
    shiradelta.apply(model, tmp_path / "2.shd")
    bits = open_checkpoint(model).bits(EMBED)
    third = TensorDelta((2, base[EMBED].shape[1]), [0, 1], [4.0, 5.0], "float32", base_bits=bits[:2].copy())
    shiradelta.save_delta(tmp_path / "3.shd", {EMBED: third}, values="f32")
    shiradelta.apply(model, tmp_path / "3.shd")
    assert shiradelta.verify(model).state == "patched"
    assert read(model, EMBED)[:2].tolist() == np.array([4, 5], np.float32).view(np.uint32).tolist()
    assert len(revert_all(model)) == 3
    assert contents(model) == before


def test_a_pipeline_of_components(tmp_path: Path):
    root = tmp_path / "pipeline"
    for component in ("unet", "text_encoder"):
        write_model(root / component, {"proj.weight": torch.ones(8, 8)})
    (root / "model_index.json").write_text("{}")
    before = contents(root)
    tensor = TensorDelta((8, 8), [3], [1.0], dtype="float32")
    shiradelta.save_delta(tmp_path / "d.shd", {"unet/proj.weight": tensor}, values="f32")
    shiradelta.apply(root, tmp_path / "d.shd")
    assert load_file(root / "unet/model.safetensors")["proj.weight"].flatten()[3] == 2
    assert load_file(root / "text_encoder/model.safetensors")["proj.weight"].flatten()[3] == 1
    shiradelta.revert(root)
    assert contents(root) == before


def test_verify_names_the_first_tensor_that_differs(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    tensors = load_file(model / "model.safetensors")
    tensors[UP].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = shiradelta.verify(model)
    assert report.state == "neither"
    assert UP in report.detail


def test_verify_without_anything_applied(model: Path, made: Path):
    assert shiradelta.verify(model).state == "unknown"
    assert shiradelta.verify(model, made / "a.shd").state == "base"
    assert not (model / ".shiradelta").exists()


def test_revert_without_anything_applied(model: Path):
    with pytest.raises(TargetError, match="nothing to revert"):
        shiradelta.revert(model)
    assert not (model / ".shiradelta").exists()


def test_a_damaged_delta_changes_nothing(model: Path, made: Path, tmp_path: Path):
    data = bytearray((made / "a.shd").read_bytes())
    with shiradelta.open_delta(made / "a.shd") as opened:
        last = list(opened.values())[-1].record.values
    data[last.offset] ^= 1
    (tmp_path / "d.shd").write_bytes(data)
    before = contents(model)
    with pytest.raises(FormatError, match="section_checksum"):
        shiradelta.apply(model, tmp_path / "d.shd")
    assert contents(model) == before


@pytest.mark.slow
def test_a_second_process_is_told_to_wait(model: Path, made: Path):
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from shiradelta.folder.journal import locked\n"
            "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            str(model),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(TargetError, match="another process"):
        shiradelta.apply(model, made / "a.shd")
    child.communicate()
    shiradelta.apply(model, made / "a.shd")


def test_a_full_disk_changes_nothing(model: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    before = contents(model)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shiradelta.util.files.os.fsync", full)
    with pytest.raises(TargetError, match="No space left"):
        shiradelta.apply(model, made / "a.shd")
    monkeypatch.undo()
    assert contents(model) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_weights_are_named(model: Path, made: Path):
    (model / "model.safetensors").chmod(0o444)
    with pytest.raises(TargetError, match=r"model\.safetensors: cannot be written"):
        shiradelta.apply(model, made / "a.shd")


def test_an_interrupt_while_patching_rolls_back(model: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    before = contents(model)
    steps = []

    def interrupt(what: str, done: int, total: int) -> None:
        steps.append(what)
        if what == "patching" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shiradelta.apply(model, made / "a.shd", progress=interrupt)
    assert "patching" in steps
    assert contents(model) == before


@pytest.mark.parametrize("damage", ["missing", "not json", "wrong version"])
def test_damaged_state_is_one_plain_error(model: Path, made: Path, damage: str):
    shiradelta.apply(model, made / "a.shd")
    state = model / ".shiradelta" / "state.json"
    state.write_text({"missing": "{}", "not json": "{", "wrong version": '{"version": 2}'}[damage])
    with pytest.raises(TargetError, match=r"state\.json: is damaged"):
        shiradelta.revert(model)


@pytest.mark.parametrize("name", ["empty", "short", "header"])
def test_damaged_weights_are_one_plain_error(tmp_path: Path, made: Path, name: str):
    folder = tmp_path / "model"
    folder.mkdir()
    data = {"empty": b"", "short": b"\xff" * 16, "header": (3).to_bytes(8, "little") + b"{]}"}[name]
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(SourceError, match=r"model\.safetensors: "):
        shiradelta.apply(folder, made / "a.shd")


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_signals_at_random_moments(made: Path, tmp_path: Path):
    """`python -m tests.killing` does this a thousand times, and to commands that train, too."""
    (tmp_path / "inputs").mkdir()
    write_inputs(tmp_path / "inputs", made / "bf16", made / "tuned_a")
    victims = [victim for victim in VICTIMS if victim.name in ("apply", "revert")]
    preload(victims)
    for victim in victims:
        kill_repeatedly(victim, tmp_path / "inputs", 4, 0, tmp_path)


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("structural", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stop_at_every_durable_step(
    made: Path, tmp_path: Path, action: str, structural: bool, monkeypatch: pytest.MonkeyPatch
):
    """Copies the folder at each moment at which something was made durable, and recovers from each copy."""
    delta = made / "a.shd"
    if structural:
        delta = tmp_path / "d.shd"
        new = TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new")
        shiradelta.save_delta(delta, {"score.weight": new, UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0])})
    model = Path(shutil.copytree(made / "bf16", tmp_path / "model"))
    base = contents(model)
    shiradelta.apply(model, delta)
    patched = weights(model)
    if action == "apply":
        shiradelta.revert(model)
    moments: list[Path] = []

    def snapshot() -> None:
        moments.append(Path(shutil.copytree(model, tmp_path / f"moment{len(moments)}")))

    for module, function in (("os", "replace"), ("os", "fsync"), ("shutil", "rmtree")):
        original = getattr(__import__(module), function)

        def wrapped(*args, original=original, **kwargs):
            snapshot()
            result = original(*args, **kwargs)
            snapshot()
            return result

        monkeypatch.setattr(f"{module}.{function}", wrapped)
    shiradelta.apply(model, delta, progress=lambda *_: snapshot()) if action == "apply" else shiradelta.revert(
        model, progress=lambda *_: snapshot()
    )
    monkeypatch.undo()
    assert len(moments) > 10
    states = set()
    for moment in moments:
        found = weights(moment)
        report = shiradelta.verify(moment)
        assert weights(moment) == found
        check_report(report, found, weights(made / "bf16"), patched)
        states.add(report.state)
        if report.interrupted or report.state == "patched":
            shiradelta.revert(moment)
        assert contents(moment) == base
    assert states >= {"base", "patched"}


def test_flags_are_keywords(made: Path, tmp_path: Path):
    model = shutil.copytree(made / "bf16", tmp_path / "model")
    with pytest.raises(TypeError, match="positional"):
        shiradelta.apply(model, made / "a.shd", None, 1.0, False, True)
    shiradelta.apply(model, made / "a.shd")
    with pytest.raises(TypeError, match="positional"):
        shiradelta.revert(model, True)


def test_no_message_names_the_temporary_copy(model: Path, made: Path, tmp_path: Path):
    """Neither an error that the delta does not fit, nor a warning."""
    out = tmp_path / "out"
    for name, shape in (("nowhere.weight", (4,)), ("model.layers.0.norm.weight", (5,))):
        shiradelta.save_delta(tmp_path / "d.shd", {name: TensorDelta(shape, [1], [1.0])})
        with pytest.raises(BaseMismatchError) as refused:
            shiradelta.apply(model, tmp_path / "d.shd", out=out)
        assert ".tmp" not in str(refused.value)
        assert name == "model.layers.0.norm.weight" or f"found in {model}," in str(refused.value)
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is left as it is" in shiradelta.apply(model, made / "a.shd", out=out).warnings


def test_what_is_wrong_with_a_folder_is_said_of_it_and_not_of_its_copy(model: Path, made: Path, tmp_path: Path):
    shiradelta.apply(model, made / "a.shd")
    undo = model / ".shiradelta" / "undo" / "0001.shd"
    undo.write_bytes(undo.read_bytes()[:-1])
    with pytest.raises(TargetError, match=re.escape(f"{undo}: is not the undo delta")):
        shiradelta.apply(model, made / "b.shd", out=tmp_path / "out")
    undo.unlink()
    with pytest.raises(TargetError, match=re.escape(f"{undo}: is missing")):
        shiradelta.apply(model, made / "b.shd", out=tmp_path / "out")


def test_an_error_of_the_system_names_no_temporary():
    error = OSError(28, "No space left on device", ".state.json.0123456789abcdef.tmp")
    assert str(system_error(error, Path("model"))) == "state.json: No space left on device; nothing was changed"
