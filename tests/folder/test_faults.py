"""Every system call of apply and revert fails, once and from then on: no bit is lost, and no report is untrue."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.folder.commit import commit
from shiradelta.folder.journal import Journal
from shiradelta.folder.listing import recorded
from shiradelta.folder.revert import revert_all
from shiradelta.folder.state import FolderState
from shiradelta.util.files import NOTHING_CHANGED, system_error
from tests.faults import READS, STRIDE, WRITES, check_true, failing, take_all_out
from tests.injection import inject_repeatedly
from tests.killing import VICTIMS
from tests.scenes import weights, write_inputs

UP = "model.layers.0.mlp.up_proj.weight"
GONE = "model.layers.1.mlp.down_proj.weight"

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="system calls of POSIX"), pytest.mark.slow]


@pytest.fixture(scope="module")
def deltas(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain delta, one on top of it, and one that adds and drops tensors."""
    folder = tmp_path_factory.mktemp("deltas")
    tensors = {
        "score.weight": TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new"),
        GONE: TensorDelta((32, 96), None, [], op="drop"),
        UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0]),
    }
    shiradelta.save_delta(folder / "whole.shd", tensors, values="f32")
    return {"a": made / "a.shd", "b": made / "b.shd", "whole": folder / "whole.shd"}


#: Kind of model, deltas that are on it, and the delta that is applied; None to revert.
SCENARIOS: dict[str, tuple[str, list[str], str | None]] = {
    "apply": ("bf16", [], "a"),
    "apply on top": ("bf16", ["a"], "b"),
    "apply whole tensors": ("sharded", [], "whole"),
    "apply whole tensors on top": ("bf16", ["a"], "whole"),
    "revert": ("bf16", ["a"], None),
    "revert one of two": ("sharded", ["a", "b"], None),
    "revert whole tensors": ("sharded", ["whole"], None),
    "revert whole tensors on top": ("bf16", ["a", "whole"], None),
}


#: Every call fails; in the rest each twentieth one, unless time does not matter (`STRIDE`).
QUICK = {("apply", WRITES, False), ("revert whole tensors on top", WRITES, True)}


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing has to be synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(("scenario", "calls", "persistent"), [*product(SCENARIOS, (WRITES, READS), (False, True))])
@pytest.mark.usefixtures("quick_disk")
def test_every_call_fails(
    made: Path, deltas: dict[str, Path], tmp_path: Path, scenario: str, calls: tuple[str, ...], persistent: bool
):
    kind, below, top = SCENARIOS[scenario]
    template = Path(shutil.copytree(made / kind, tmp_path / "template"))
    states = [weights(template)]
    for name in below:
        shiradelta.apply(template, deltas[name])
        states.append(weights(template))
    before = len(states) - 1

    def act(model: Path) -> None:
        if top is None:
            shiradelta.revert(model)
        else:
            shiradelta.apply(model, deltas[top])

    if top is not None:
        done = Path(shutil.copytree(template, tmp_path / "done"))
        act(done)
        states.append(weights(done))
    stride = 1 if (scenario, calls, persistent) in QUICK else STRIDE
    number, hit = 1 + len(scenario) % stride - stride, True  # scenarios begin at different calls
    while hit:
        number += stride
        model = Path(shutil.copytree(template, tmp_path / f"model{number}"))
        error = errno.ENOSPC if number // stride % 3 == 0 else errno.EIO
        said = ""
        with failing(number, error, calls, persistent=persistent) as faults:
            try:
                act(model)
            except ShiraDeltaError as refusal:
                said = str(refusal)
        hit = faults.hit
        assert "\n" not in said
        if "nothing was changed" in said:
            assert weights(model) == states[before], f"call {number}: {said}"
            assert len(shiradelta.verify(model).applied) == before
        check_true(model, states)
        take_all_out(model, states[0])
        shutil.rmtree(model)
    assert number > 30


def test_closing_what_is_on_the_disk_may_fail(made: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """The files are synced by then, so an error that says "nothing was changed" would not be true."""
    base, close = weights(model), os.close

    def fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", fail)
    shiradelta.apply(model, made / "a.shd")
    shiradelta.revert(model)
    commit(model)
    assert weights(model) == base


def test_a_revert_of_all_says_what_it_has_taken_out(made: Path, model: Path):
    for name in ("a", "b"):
        shiradelta.apply(model, made / f"{name}.shd")
    (model / ".shiradelta" / "undo" / "0001.shd").unlink()
    with pytest.raises(TargetError, match=r"^b\.shd was taken out, and then: .*0001\.shd: is missing"):
        revert_all(model)
    assert [entry.file for entry in recorded(model).applied] == ["a.shd"]


def test_a_revert_of_all_that_fails_says_what_else_was_changed(
    made: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a", "b"):
        shiradelta.apply(model, made / f"{name}.shd")
    refused = TargetError("no space", ending=NOTHING_CHANGED)
    real = Journal.save

    def save(journal: Journal, state: FolderState) -> None:
        if not state.applied and state.pending:
            raise refused
        real(journal, state)

    monkeypatch.setattr(Journal, "save", save)
    with pytest.raises(TargetError) as failed:
        revert_all(model)
    assert str(failed.value) == "b.shd was taken out, and then: no space; nothing else was changed"


def test_an_error_names_no_number_of_a_descriptor():
    said = str(system_error(OSError(errno.EIO, "Input/output error", 10), Path("model")))
    assert said == "model: cannot be written (Input/output error); nothing was changed"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_calls_that_fail_from_outside(made: Path, tmp_path: Path):
    """`python -m tests.injection` does this to every call of every command."""
    (tmp_path / "inputs").mkdir()
    write_inputs(tmp_path / "inputs", made / "bf16", made / "tuned_a")
    victims = [victim for victim in VICTIMS if victim.name == "apply"]
    seen, wrong = inject_repeatedly(victims, tmp_path / "inputs", 6, 0, tmp_path)
    assert not wrong
    assert sum(seen.values()) == 6


@pytest.mark.parametrize("leftover", ["undo/.0001.shd.x.tmp", ".state.json.x.tmp", "undo/0001/x.safetensors.new"])
@pytest.mark.parametrize("act", [shiradelta.apply, lambda model, delta: shiradelta.revert(model)])
def test_what_a_killed_command_left_is_in_nobodys_way(
    made: Path, model: Path, leftover: str, act: Callable[[Path, Path], object]
):
    base = weights(model)
    shiradelta.apply(model, made / "a.shd")
    path = model / ".shiradelta" / leftover
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"left")
    act(model, made / "b.shd")
    assert leftover.startswith("undo/0001/") or not path.exists()
    take_all_out(model, base)
    assert not path.exists()
