"""A folder from anywhere touches nothing outside: one row a trick, for every command.  `--out` copies files only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.util import directory
from tests.conftest import write_model
from tests.scenes import contents

UP = "model.layers.0.mlp.up_proj.weight"
ENTRY = {"id": 1, "file": "x.shd", "digest": "00", "strength": 1.0, "tensors": 1, "nonzeros": 1, "added": {}}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def tree(folder: Path) -> dict[str, object]:
    """Every path of a folder with what is there; links as links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def without_journal(model: Path) -> dict[str, object]:
    return {name: data for name, data in tree(model).items() if not name.startswith(".")}


def pending(model: Path, replaced: list[str]) -> Path:
    """A state of version 1 with an unfinished action, and its undo delta; returns the folder of originals."""
    own = model / ".shiradelta"
    (own / "undo" / "0001").mkdir(parents=True)
    state = {"version": 1, "applied": [], "pending": {**ENTRY, "replaced": replaced}}
    (own / "state.json").write_text(json.dumps(state))
    undo = TensorDelta((96, 32), [0], np.zeros(1, "<u2"), dtype="bfloat16", op="set")
    shiradelta.save_delta(own / "undo" / "0001.shd", {UP: undo})
    return own / "undo" / "0001"


def folder_link(model: Path, outside: Path) -> None:
    originals = pending(model, ["sub/model.safetensors"])
    (model / "sub").symlink_to(outside)
    (originals / "sub").mkdir()
    (originals / "sub" / "model.safetensors").write_bytes(b"evil")


def originals_link(model: Path, outside: Path) -> None:
    originals = pending(model, ["sub/model.safetensors"])
    (model / "sub").mkdir()
    (originals / "sub").symlink_to(outside)


def originals_itself_a_link(model: Path, outside: Path) -> None:
    originals = pending(model, ["model.safetensors"])
    originals.rmdir()
    originals.symlink_to(outside)


def original_file_link(model: Path, outside: Path) -> None:
    (pending(model, ["model.safetensors"]) / "model.safetensors").symlink_to(outside / "model.safetensors")


def weights_link(model: Path, outside: Path) -> None:
    pending(model, [])
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(outside / "model.safetensors")


def own_link(model: Path, outside: Path) -> None:
    (model / ".shiradelta").symlink_to(outside)


def lock_link(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    (model / ".shiradelta" / "lock").symlink_to(outside / "created")


def lock_link_to_a_file(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    (model / ".shiradelta" / "lock").symlink_to(outside / "model.safetensors")


def undo_link(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    (model / ".shiradelta" / "undo").symlink_to(outside)


def undo_file_link(model: Path, outside: Path) -> None:
    own = pending(model, []).parent
    (own / "0001.shd").rename(outside / "undo.shd")
    (own / "0001.shd").symlink_to(outside / "undo.shd")


def state_link(model: Path, outside: Path) -> None:
    pending(model, [])
    (model / ".shiradelta" / "state.json").rename(outside / "state.json")
    (model / ".shiradelta" / "state.json").symlink_to(outside / "state.json")


def state_pipe(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    os.mkfifo(model / ".shiradelta" / "state.json")


def lock_pipe(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    os.mkfifo(model / ".shiradelta" / "lock")


def undo_pipe(model: Path, outside: Path) -> None:
    (pending(model, []).parent / "0001.shd").unlink()
    os.mkfifo(model / ".shiradelta" / "undo" / "0001.shd")


def nested_state(model: Path, outside: Path) -> None:
    (model / ".shiradelta").mkdir()
    (model / ".shiradelta" / "state.json").write_text("[" * 100_000)


def leftovers_with_links(model: Path, outside: Path) -> None:
    """What is removed as a leftover is never followed."""
    leftovers_without_a_state(model, outside)
    state = {"version": 1, "applied": [], "pending": None}
    (model / ".shiradelta" / "state.json").write_text(json.dumps(state))


def leftovers_without_a_state(model: Path, outside: Path) -> None:
    """Nor is what may tell of a lost state."""
    deep = model / ".shiradelta" / "undo" / "0007" / "unet"
    deep.mkdir(parents=True)
    (deep / "out").symlink_to(outside)
    (model / ".shiradelta" / ".state.json.x.tmp").symlink_to(outside / "model.safetensors")


TRICKS = [
    folder_link,
    originals_link,
    originals_itself_a_link,
    original_file_link,
    weights_link,
    own_link,
    lock_link,
    lock_link_to_a_file,
    undo_link,
    undo_file_link,
    state_link,
    state_pipe,
    lock_pipe,
    undo_pipe,
    nested_state,
    leftovers_with_links,
    leftovers_without_a_state,
]
COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "verify": lambda model, delta: shiradelta.verify(model),
    "revert": lambda model, delta: shiradelta.revert(model),
    "revert --force": lambda model, delta: shiradelta.revert(model, force=True),
    "apply": lambda model, delta: shiradelta.apply(model, delta),
    "apply --out": lambda model, delta: shiradelta.apply(model, delta, out=model.parent / "out"),
}


@pytest.mark.parametrize("by_descriptor", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_no_trick_reaches_anything_outside(
    made: Path,
    tmp_path: Path,
    trick: Callable[[Path, Path], None],
    by_descriptor: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(directory, "BY_DESCRIPTOR", by_descriptor and directory.BY_DESCRIPTOR)
    for command, run in COMMANDS.items():
        model = Path(shutil.copytree(made / "bf16", tmp_path / command / "model"))
        outside = write_model(tmp_path / command / "outside", {UP: torch.ones(96, 32, dtype=torch.bfloat16)})
        trick(model, outside)
        before = tree(outside)
        weights = without_journal(model)
        refused = None
        try:
            run(model, made / "a.shd")
        except ShiraDeltaError as error:
            refused = str(error)
        assert "\n" not in (refused or ""), command
        changes = refused is None and command == "apply" and trick is leftovers_with_links
        assert (without_journal(model) == weights) != changes, command
        assert tree(outside) == before, command


@pytest.mark.parametrize("moment", ["checking", "patching"])
def test_a_link_put_in_the_weights_place_meanwhile_is_not_followed(
    model: Path, made: Path, tmp_path: Path, moment: str
):
    outside = Path(shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors"))
    before = outside.read_bytes()

    def swap(what: str, done: int, total: int) -> None:
        if what == moment and not done:
            (model / "model.safetensors").rename(tmp_path / "moved")
            (model / "model.safetensors").symlink_to(outside)

    with suppress(TargetError):
        shiradelta.apply(model, made / "a.shd", progress=swap)
    assert (model / "model.safetensors").is_symlink()
    assert outside.read_bytes() == before


def test_verify_writes_nothing(model: Path, made: Path):
    for step in (lambda: None, lambda: shiradelta.apply(model, made / "a.shd"), lambda: shiradelta.revert(model)):
        step()
        before = {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in (model, *model.rglob("*"))}
        shiradelta.verify(model)
        assert {path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in (model, *model.rglob("*"))} == before


# ---------------------------------------------------------------------------------------------- --out


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: link(model / "key", model.parent / "secret"), "key: is a link"),
        (lambda model: link(model / "folder", model.parent), "folder: is a link"),
        (lambda model: link(model / "zeros", Path("/dev/zero")), "zeros: is a link"),
        (lambda model: link(model / "nothing", model / "nowhere"), "nothing: is a link"),
        (lambda model: os.mkfifo(model / "pipe"), "pipe: is a named pipe"),
    ],
)
def test_out_refuses_what_is_no_file_by_name(
    model: Path, made: Path, tmp_path: Path, make: Callable[[Path], None], words: str
):
    (tmp_path / "secret").write_text("precious")
    make(model)
    with pytest.raises(TargetError, match=words):
        shiradelta.apply(model, made / "a.shd", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def hub_cache(made: Path, root: Path) -> Path:
    """A snapshot in a hub's cache: links to blobs."""
    snapshot = root / "models--org--name" / "snapshots" / "0123"
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((made / "sharded").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_hubs_cache_is_copied_and_never_patched_in_place(made: Path, tmp_path: Path):
    snapshot = hub_cache(made, tmp_path / "hub")
    before = tree(tmp_path / "hub")
    with pytest.raises(TargetError, match=r"in the Hub's cache.*--out"):
        shiradelta.apply(snapshot, made / "a.shd")
    assert tree(tmp_path / "hub") == before
    shiradelta.apply(snapshot, made / "a.shd", out=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    shiradelta.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made / "sharded")
    assert tree(tmp_path / "hub") == before


def test_a_hubs_cache_with_a_link_to_elsewhere_is_refused(made: Path, tmp_path: Path):
    snapshot = hub_cache(made, tmp_path / "hub")
    (tmp_path / "secret").write_text("precious")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(TargetError, match=r"notes\.txt: is a link"):
        shiradelta.apply(snapshot, made / "a.shd", out=tmp_path / "out")


def test_out_takes_an_interrupted_action_back_in_the_copy_only(
    model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object) -> None:
        raise SystemExit

    base = (model / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("shiradelta.folder.apply.give_up", lambda *_: "killed")
        with pytest.raises(TargetError, match="killed"):
            shiradelta.apply(model, made / "a.shd", progress=lambda what, *_: stop() if what == "syncing" else None)
    half = tree(model)
    assert half["model.safetensors"] != base
    shiradelta.apply(model, made / "b.shd", out=tmp_path / "out")
    assert tree(model) == half
    shiradelta.revert(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == base
