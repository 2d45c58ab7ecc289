"""Several processes on one folder: one at a time, and the way back is never lost."""

from __future__ import annotations

import errno
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

import shiradelta
from shiradelta.errors import TargetError
from tests.forked import CONTEXT
from tests.scenes import contents


def work(model: Path, deltas: list[Path], seconds: float, seed: int) -> None:
    """Applies and reverts at random; only TargetErrors are expected."""
    generator = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(TargetError):
            if generator.random() < 0.5:
                shiradelta.apply(model, generator.choice(deltas))
            else:
                shiradelta.revert(model)


def revert_all(model: Path) -> None:
    for _ in shiradelta.verify(model).applied:
        shiradelta.revert(model)
    with pytest.raises(TargetError, match="nothing to revert"):
        shiradelta.revert(model)


@pytest.mark.slow
def test_four_processes_never_lose_the_way_back(model: Path, made: Path):
    before = contents(model)
    for round_ in range(2):
        workers = [
            CONTEXT.Process(target=work, args=(model, [made / "a.shd", made / "b.shd"], 1.0, 4 * round_ + i))
            for i in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        revert_all(model)
        assert contents(model) == before


def test_the_lock_outlasts_every_command(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    lock = (model / ".shiradelta" / "lock").stat().st_ino
    shiradelta.revert(model)
    with pytest.raises(TargetError, match="nothing to revert"):
        shiradelta.revert(model)
    shiradelta.apply(model, made / "b.shd")
    assert (model / ".shiradelta" / "lock").stat().st_ino == lock


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_with_the_option(
    model: Path, made: Path, reason: int, monkeypatch: pytest.MonkeyPatch
):
    def none(descriptor: int, shared: bool) -> None:
        raise OSError(reason, "no locks")

    monkeypatch.setattr("shiradelta.util.locks._lock", none)
    before = contents(model)
    with pytest.raises(TargetError, match=r"cannot lock files .* --no-lock"):
        shiradelta.apply(model, made / "a.shd")
    assert contents(model) == before
    shiradelta.apply(model, made / "a.shd", lock=False)
    assert shiradelta.verify(model).state == "patched"
    with pytest.raises(TargetError, match="--no-lock"):
        shiradelta.revert(model)
    shiradelta.revert(model, lock=False)
    assert contents(model) == before


def test_a_folder_deleted_under_the_lock_is_noticed(model: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    """Two processes would otherwise hold two locks at once."""
    from shiradelta.util import locks

    own, real = model / ".shiradelta", locks._lock

    def replaced(descriptor: int, shared: bool) -> None:
        own.rename(model.parent / "gone")
        own.mkdir()
        real(descriptor, shared)

    monkeypatch.setattr(locks, "_lock", replaced)
    with pytest.raises(TargetError, match="another process"):
        shiradelta.apply(model, made / "a.shd")
