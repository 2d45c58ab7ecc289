"""A training of a family that is interrupted, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from shiradelta import experts
from shiradelta.errors import SourceError, TargetError
from tests.experts.test_family import EXAMPLES, SETTINGS, TASKS, loss, model, prompt_loss

SHORT = replace(SETTINGS, steps=9, relative_lr=None)


class Counted:
    """A loss that counts its calls, and ends with Ctrl-C at one of them."""

    def __init__(self, at: int = -1, of: Any = loss) -> None:
        self.at, self.of, self.calls = at, of, 0

    def __call__(self, network: nn.Module, some: Any) -> Tensor:
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.of(network, some)


def train(out: Path, given: Any = loss, prompt: Any = prompt_loss, **more: Any) -> experts.ExpertFamily:
    options = {"experts": 2, "groups": TASKS, "settings": SHORT, "dims": 64, "unfinished": out.with_suffix(".train")}
    return experts.train_family(model(), EXAMPLES, given, out, prompt_loss=prompt, **options | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[experts.ExpertFamily, int]:
    """(the family that is trained without an interruption, calls of its loss)."""
    counted = Counted()
    folder = tmp_path_factory.mktemp("whole")
    family = train(folder / "f", counted)
    assert [path.name for path in folder.iterdir()] == ["f"]
    return family, counted.calls


@contextmanager
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", -1)
    with pytest.raises(KeyboardInterrupt):
        yield


def is_same(one: experts.ExpertFamily, other: experts.ExpertFamily) -> bool:
    return one.digests == other.digests and np.array_equal(one.centroids, other.centroids)


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(14, id="base", marks=pytest.mark.slow),
        pytest.param(12, id="between", marks=pytest.mark.slow),
        pytest.param(8, id="first expert"),
        pytest.param(2, id="last expert", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_ends_in_the_same_family(
    left: int, whole: tuple[experts.ExpertFamily, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family, calls = whole
    network_left = calls - left
    with at_every_step(monkeypatch):
        train(tmp_path / "f", Counted(network_left))
    assert [path.name for path in tmp_path.iterdir()] == ["f.train"]
    again = Counted()
    assert is_same(train(tmp_path / "f", again), family)
    assert again.calls <= left
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.slow
def test_a_search_for_the_mask_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    searched = replace(SHORT, mask="rigsa")
    whole = train(tmp_path / "w", settings=searched)

    def stop(*given: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shiradelta.experts.training.find_lr", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "f", settings=searched)
    monkeypatch.setattr("shiradelta.train.rigsa.search", stop)
    assert is_same(train(tmp_path / "f", settings=searched), whole)


def test_features_are_taken_once(
    whole: tuple[experts.ExpertFamily, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family, calls = whole
    with at_every_step(monkeypatch):
        train(tmp_path / "f", Counted(calls - 2))
    gradients = Counted(of=prompt_loss)
    assert is_same(train(tmp_path / "f", prompt=gradients), family)
    assert gradients.calls == 0


@pytest.mark.slow
def test_another_training_takes_what_does_not_depend_on_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with at_every_step(monkeypatch):
        train(tmp_path / "f", Counted(whole_calls(tmp_path) - 2))
    steps = Counted()
    train(tmp_path / "f", steps, groups=[1 - task for task in TASKS])
    assert steps.calls == SHORT.steps  # of the experts
    with at_every_step(monkeypatch):
        train(tmp_path / "g", Counted(40))
    other = Counted()
    settings = replace(SHORT, seed=1)
    train(tmp_path / "g", other, settings=settings)
    assert other.calls == whole_calls(tmp_path, settings=settings)


def whole_calls(folder: Path, **more: Any) -> int:
    counted = Counted()
    train(folder / f"counted-{len(list(folder.iterdir()))}", counted, **more)
    return counted.calls


def test_there_is_no_folder_before_there_is_a_state(tmp_path: Path):
    """So a process that is killed early leaves nothing."""
    seen = []

    def given(network: nn.Module, some: Any) -> Tensor:
        seen.append((tmp_path / "f.train").exists())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "f", given)
    assert seen == [False]
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="file"):  # at once
        train(tmp_path / "f", given, unfinished=tmp_path / "file" / "f.train")
    assert seen == [False]


def test_what_cannot_go_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "f.train").mkdir()
    (tmp_path / "f.train" / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"holds notes\.txt"):
        train(tmp_path / "f")
    assert (tmp_path / "f.train" / "notes.txt").exists()
    with at_every_step(monkeypatch):
        train(tmp_path / "g", Counted(60))
    with pytest.raises(SourceError, match="not those that the interrupted run began with"):
        experts.train_family(
            model(1), EXAMPLES, loss, tmp_path / "g", prompt_loss=prompt_loss, experts=2, groups=TASKS,
            settings=SHORT, dims=64, unfinished=tmp_path / "g.train",
        )  # fmt: skip
