"""The power is cut at every moment of apply and revert; whatever POSIX allows to be left has a way back to the base."""

from __future__ import annotations

import os
import random
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import shiradelta
from shiradelta import TensorDelta
from shiradelta.util.directory import Directory
from tests import BRIEF
from tests.faults import check_true, take_all_out
from tests.folder.test_faults import GONE, UP
from tests.power import Disk, recorded
from tests.scenes import weights

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds the path of a descriptor in /proc"),
    pytest.mark.slow,
]

#: Outcomes that are tried of each moment.
TRIES = 1 if BRIEF else 4


def whole(folder: Path) -> Path:
    """A delta that adds, drops and changes tensors."""
    tensors = {
        "score.weight": TensorDelta((2, 32), None, np.arange(64, dtype=np.uint16), "bfloat16", "new"),
        GONE: TensorDelta((32, 96), None, [], op="drop"),
        UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0]),
        "model.embed_tokens.weight": TensorDelta((64, 32), [3, 70, 900], [1.0, -1.0, 2.0]),
    }
    shiradelta.save_delta(folder / "whole.shd", tensors, values="f32")
    return folder / "whole.shd"


def replay(disk: Disk, work: Path, states: list[dict[str, bytes]], seed: int) -> int:
    """Recovers from what each moment may leave; returns how many were not simply one of the states."""
    chance, half_way = random.Random(seed), 0
    for number, cut in enumerate(disk.moments):
        for each in range(TRIES):
            left = work / f"{number}-{each}"
            cut(left, chance)
            half_way += weights(left) not in states
            check_true(left, states)
            take_all_out(left, states[0])
            shutil.rmtree(left)
    return half_way


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power is cut on paper only, so nothing has to be synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(
    ("action", "tensors", "kind"),
    [
        pytest.param(*row, marks=[] if row == ("apply", "whole", "bf16") else pytest.mark.slow)
        for row in product(("apply", "revert"), ("elements", "whole"), ("bf16", "sharded"))
    ],
)
def test_a_power_cut_leaves_a_way_back(made: Path, tmp_path: Path, action: str, tensors: str, kind: str):
    delta = made / "a.shd" if tensors == "elements" else whole(tmp_path)
    model = Path(shutil.copytree(made / kind, tmp_path / "model"))
    states = [weights(model)]
    done = Path(shutil.copytree(model, tmp_path / "done"))
    shiradelta.apply(done, delta)
    states.append(weights(done))
    if action == "revert":
        shiradelta.apply(model, delta)
    with recorded(model) as disk:
        tell = lambda *_: disk.look()  # noqa: E731
        if action == "apply":
            shiradelta.apply(model, delta, progress=tell)
        else:
            shiradelta.revert(model, progress=tell)
    assert len(disk.moments) > 20
    half_way = replay(disk, tmp_path, states, seed=0)
    assert (half_way > 0) == (tensors == "elements" or kind == "sharded")  # one rewritten file is swapped at once


def test_the_replay_finds_a_missing_sync(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without syncs of folders, files are lost; the replay has to see that."""
    monkeypatch.setattr(Directory, "sync", lambda self: None)
    model = Path(shutil.copytree(made / "sharded", tmp_path / "model"))
    states = [weights(model)]
    with recorded(model) as disk:
        shiradelta.apply(model, whole(tmp_path))
    states.append(weights(model))
    monkeypatch.undo()
    with pytest.raises((AssertionError, shiradelta.ShiraDeltaError)):
        replay(disk, tmp_path, states, seed=0)
