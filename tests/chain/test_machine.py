"""A chain, its publisher and its followers against a plain list of arrays, with everything that goes wrong.

Processes die in the middle of a system call and after it, steps come twice, early and late, the middle is pruned, files
are damaged, the store fails.  Whatever a follower has is a version, bit for bit, and every refusal has a name.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, pages, remote
from shiradelta.chain.remote import RemoteStore
from shiradelta.chain.state import state_digest, state_of
from shiradelta.chain.stores import FolderStore, Store
from shiradelta.errors import CHAIN_REASONS
from shiradelta.models.checkpoint import open_checkpoint
from tests import BRIEF
from tests.chain.models import Model, add_step, change, read, replayed, same, set_step, small, tensor, write

fsspec = pytest.importorskip("fsspec")
#: Actions of each machine that has ended, for the report of a long run.
COUNTED: list[int] = []
#: Steps that were published to each machine that has ended.
REACHED: list[int] = []
#: Calls that change what is on the disk.
CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir", "rename")
VERSIONS = st.integers(0, 1 << 16)
MOMENTS = st.none() | st.integers(0, 30)


class Killed(BaseException):
    """The process is dead: nothing that it does from here on reaches the disk."""


@contextmanager
def killed_at(moment: int | None) -> Iterator[None]:
    """Lets the system's calls that write end the process from the given one on; None lets it live."""
    left = [moment]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if left[0] is not None:
                if left[0] <= 0:
                    raise Killed
                left[0] -= 1
            return call(*args, **options)

        return wrapped

    with mock.patch.multiple(os, **{name: dying(getattr(os, name)) for name in CALLS}), suppress(Killed):
        yield


class ChainMachine(RuleBasedStateMachine):
    """Everyone who has to do with a chain."""

    page_steps, newest = 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.small_pages = mock.patch.multiple(pages, PAGE_STEPS=self.page_steps, NEWEST=self.newest)
        self.small_pages.start()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.rng = np.random.default_rng(0)
        self.cache = self.root / "cache"
        self.number = self.actions = 0
        self.failing: random.Random | None = None
        self.models: list[Model] = []

    def teardown(self) -> None:
        COUNTED.append(self.actions)
        REACHED.append(len(self.models) - 1)
        self.small_pages.stop()
        shutil.rmtree(self.root)

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.models = [self.model()]
        Chain.create(self.place(), write(self.root / "model", self.models[0]))

    def model(self) -> Model:
        """What the chain begins with."""
        return {name: one for name, one in small().items() if name != "layers.1.up.weight"}

    def place(self) -> Path | Store:
        """Where the chain is."""
        return self.root / "chain"

    def trouble(self, moment: int | None) -> AbstractContextManager[None]:
        """What goes wrong while something is done; nothing with None."""
        return killed_at(moment)

    def stored(self) -> list[str]:
        """The files of steps, pages and anchors."""
        return FolderStore(self.root / "chain").files()

    def replace_file(self, path: str, data: bytes | None) -> bytes:
        """Gives a stored file other bytes, or removes it; those that it had, if it was there."""
        file = self.root / "chain" / path
        before = file.read_bytes() if file.exists() else b""
        if data is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return before

    @property
    def chain(self) -> Chain:
        """As another process would open it."""
        return Chain.open(self.place())

    def path(self, name: str) -> Path:
        """A free path."""
        self.number += 1
        return self.root / f"{name}{self.number}"

    def step(self, adds: bool) -> tuple[Path, Model]:
        before = self.models[-1]
        path = self.path("step")
        sd.save_delta(
            path, add_step(before, self.rng) if adds else set_step(before, change(before, self.rng)), values="f32"
        )
        return path, replayed(before, path)

    def version(self, number: int) -> int:
        return number % len(self.models)

    def refused(self, call: Callable[[], object], *reasons: str) -> bool:
        """Whether a call is refused, by one of these names."""
        try:
            call()
        except sd.ChainError as error:
            if error.reason == "store_failed" and self.failing is not None:
                raise
            assert error.reason in reasons, error  # noqa: PT017
            assert error.reason in CHAIN_REASONS  # noqa: PT017
            return True
        return False

    # ------------------------------------------------------------------------------------ the publisher

    @rule(adds=st.booleans(), moment=MOMENTS)
    def publish(self, adds: bool, moment: int | None) -> None:
        path, after = self.step(adds)
        with self.trouble(moment):
            self.chain.publish(path, version=len(self.models))
        if self.chain.head == len(self.models):
            self.models.append(after)
            assert self.refused(lambda: self.chain.publish(path), "duplicate")
            assert self.refused(lambda: self.chain.publish(path, version=len(self.models) - 1), "duplicate")
        assert self.chain.head == len(self.models) - 1

    @rule(early=st.integers(1, 3), late=VERSIONS)
    def publish_out_of_order(self, early: int, late: int) -> None:
        path, _ = self.step(False)
        chain = self.chain
        assert self.refused(lambda: chain.publish(path, version=len(self.models) + early), "gap")
        with suppress(sd.ArgumentError):  # no step gives version 0
            assert self.refused(lambda: chain.publish(path, version=self.version(late)), "taken", "duplicate")

    @precondition(lambda self: len(self.models) > 1)
    @rule(number=VERSIONS)
    def publish_what_was_made_for_another_version(self, number: int) -> None:
        base = write(self.path("base"), self.models[self.version(number)])
        if not same(read(base), self.models[-1]):
            path, _ = self.step(False)
            assert self.refused(lambda: self.chain.publish(path, base=base), "other_model")
        shutil.rmtree(base)

    @rule(one=VERSIONS, other=VERSIONS, has_base=st.booleans(), moment=MOMENTS)
    def fold(self, one: int, other: int, has_base: bool, moment: int | None) -> None:
        start, stop = self.version(one), self.version(other)
        base = write(self.path("base"), self.models[start]) if has_base else None
        allowed = ["duplicate", "pruned", *([] if has_base else ["needs_base"])]
        with self.trouble(moment), pytest.raises(sd.ArgumentError) if start >= stop else nullcontext():
            self.refused(lambda: self.chain.fold(start, stop, base=base), *allowed)

    @rule(number=VERSIONS, moment=MOMENTS)
    def anchor(self, number: int, moment: int | None) -> None:
        model = write(self.path("anchor"), self.models[self.version(number)])
        with self.trouble(moment):
            self.refused(lambda: self.chain.publish_anchor(model, self.version(number)), "duplicate", "not_published")

    @rule(number=VERSIONS | st.none(), moment=MOMENTS)
    def collect(self, number: int | None, moment: int | None) -> None:
        with self.trouble(moment):
            before = None if number is None else self.version(number)
            self.refused(lambda: self.chain.collect(before), "pruned")

    # ------------------------------------------------------------------------------------- the followers

    @rule(who=st.integers(0, 1), number=VERSIONS | st.none(), keep=st.integers(1, 3), moment=MOMENTS)
    def follow(self, who: int, number: int | None, keep: int, moment: int | None) -> None:
        to = None if number is None else self.version(number)
        with self.trouble(moment):
            follower = FolderFollower(self.chain, self.root / f"follower{who}", keep=keep)
            if not self.refused(lambda: follower.follow(to), "pruned", "not_kept") and moment is None:
                assert follower.version == (self.chain.head if to is None else to)

    @rule(number=VERSIONS)
    def come_late(self, number: int) -> None:
        folder, version = self.path("late"), self.version(number)
        if not self.refused(lambda: FolderFollower(self.chain, folder).follow(version), "pruned"):
            assert same(read(folder), self.models[version])
        if version == self.chain.head:
            assert folder.exists(), "the newest version can always be reached"
        shutil.rmtree(folder, ignore_errors=True)

    @rule(number=VERSIONS, byte=VERSIONS, gone=st.booleans())
    def damage(self, number: int, byte: int, gone: bool) -> None:
        """A file is damaged or missing for a while: whoever needs it says so."""
        files = self.stored()
        file = files[number % len(files)]
        listed = file in self.chain.manifest.files()
        whole = self.replace_file(file, None)
        if not gone:
            at = byte % len(whole)
            self.replace_file(file, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        self.cache = self.path("cache")  # nothing of it was read before
        folder, problems = self.path("late"), list[str]()
        try:
            if not self.refused(FolderFollower(self.chain, folder).follow, "missing_file", "wrong_bytes"):
                assert same(read(folder), self.models[-1])
            if self.refused(lambda: problems.extend(self.chain.verify()), "missing_file", "wrong_bytes"):
                assert listed
                assert file.startswith("pages/")
            else:
                assert bool(problems) == listed
        finally:
            self.replace_file(file, whole)
            shutil.rmtree(folder, ignore_errors=True)

    @invariant()
    def counted(self) -> None:
        self.actions += 1

    @invariant()
    def every_follower_has_a_version(self) -> None:
        for who in (0, 1):
            folder = self.root / f"follower{who}"
            if folder.exists():
                version = FolderFollower(self.chain, folder).version
                assert version is not None
                assert same(read(folder), self.models[version])

    @invariant()
    def the_chain_is_whole(self) -> None:
        if self.models:
            states = self.chain.manifest.states()
            assert max(states) == len(self.models) - 1
            assert self.chain.verify() == []


class FailingFiles:
    """A client of a store of which a fifth of the calls fail, half of these when their work is done."""

    def __init__(self, inner: Any, rng: random.Random) -> None:
        self.inner, self.rng = inner, rng

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return partial(self._called, found) if callable(found) else found

    def _called(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.rng.random() < 0.1:
            raise OSError(5, "the line is dead")
        found = call(*args, **options)
        if self.rng.random() < 0.1:
            raise OSError(5, "the answer is lost")
        return found


class RemoteMachine(ChainMachine):
    """The same with a store that is no folder: it has no lock, and fails at random."""

    def __init__(self) -> None:
        super().__init__()
        self.impatient = mock.patch.multiple(remote, _TRIES=2, _PAUSE=0.0)
        self.impatient.start()
        self.url = f"memory://{self.root.name}/run"

    def teardown(self) -> None:
        fsspec.filesystem("memory").rm(self.root.name, recursive=True)
        self.impatient.stop()
        super().teardown()

    def place(self) -> RemoteStore:
        store = RemoteStore(self.url, cache=self.cache)
        if self.failing is not None:
            store._fs = FailingFiles(store._fs, self.failing)
        return store

    @contextmanager
    def trouble(self, moment: int | None) -> Iterator[None]:
        """The process is killed, or the store fails at random; or both."""
        self.failing = None if moment is None or moment % 3 == 0 else random.Random(moment)
        try:
            with killed_at(None if moment is not None and moment % 3 == 1 else moment):
                yield
        except sd.ChainError as error:
            if error.reason != "store_failed" or self.failing is None:
                raise
        finally:
            self.failing = None

    def stored(self) -> list[str]:
        return RemoteStore(self.url).files()

    def replace_file(self, path: str, data: bytes | None) -> bytes:
        files, at = fsspec.filesystem("memory"), f"/{self.root.name}/run/{path}"
        before: bytes = files.cat_file(at) if files.exists(at) else b""
        if data is None:
            files.rm_file(at)
        else:
            files.pipe_file(at, data)
        return before


class LongMachine(ChainMachine):
    """The same while the trainer goes on: after every action it publishes a burst of steps, until there are 1,000.

    In a burst, too, the process dies at times, and steps come twice and early.  A fold of each burst is published.
    """

    page_steps, newest = 50, 10
    burst, enough = 40, 1000

    def model(self) -> Model:
        return {"w": tensor(np.random.default_rng(0), (8, 8))}

    @invariant()
    def the_trainer_goes_on(self) -> None:
        if not self.models or len(self.models) > self.enough:
            return
        start, chain = len(self.models) - 1, self.chain
        for number in range(start + 1, min(start + self.burst, self.enough) + 1):
            path, after = self.step(False)
            if self.rng.random() < 0.05:
                assert self.refused(partial(chain.publish, path, version=number + 1), "gap")
            if self.rng.random() < 0.1:
                with self.trouble(int(self.rng.integers(20))):
                    self.chain.publish(path, version=number)
            chain = self.chain
            if chain.head < number:
                chain.publish(path, version=number)
            self.models.append(after)
            if self.rng.random() < 0.05:
                assert self.refused(partial(chain.publish, path, version=number), "duplicate")
        self.refused(lambda: chain.fold(start, chain.head), "duplicate")

    @invariant()
    def the_chain_is_whole(self) -> None:
        """All of it is read at times only."""
        if self.models and self.actions % 10 == 0:
            super().the_chain_is_whole()


MACHINES = {each.__name__: each for each in (ChainMachine, RemoteMachine, LongMachine)}


def many(steps: int, examples: int) -> settings:
    """Settings for a number of actions in a row, and a number of such rows."""
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )


ChainMachine.TestCase.settings = RemoteMachine.TestCase.settings = many(30, settings.default.max_examples // 2)
TestChain = pytest.mark.slow(ChainMachine.TestCase)
TestRemoteChain = pytest.mark.slow(RemoteMachine.TestCase)


@pytest.mark.slow
def test_everything_goes_wrong_while_a_thousand_steps_are_published():
    """In brief 200.  The first of two rows is the simplest there is: one action, again and again."""
    with mock.patch.object(LongMachine, "enough", 200 if BRIEF else 1000):
        steps = LongMachine.enough // LongMachine.burst + 5
        run_state_machine_as_test(LongMachine, settings=settings(many(steps, 2), derandomize=True, database=None))
        assert min(REACHED[-2:]) >= LongMachine.enough


@pytest.mark.slow
def test_a_thousand_steps(tmp_path: Path):
    """One tensor, a thousand steps (in brief 400), folds of folds: the end is that of a plain array."""
    count = 400 if BRIEF else 1000
    rng = np.random.default_rng(0)
    models = [{"w": ("bfloat16", (64, 64), rng.integers(0, 1 << 15, 4096).astype("<u2"))}]
    chain = Chain.create(tmp_path / "chain", write(tmp_path / "model", models[0]))
    path = tmp_path / "step.shd"
    for number in range(1, count + 1):
        models.append(change(models[-1], rng, 0.01))
        sd.save_delta(path, set_step(models[-2], models[-1]))
        chain.publish(path, version=number)
    for start in range(0, count, 100):
        chain.fold(start, start + 100)
    chain.fold(0, count)
    for stop in (count, count - 50, 300):
        folder = tmp_path / f"late{stop}"
        FolderFollower(chain, folder).follow(stop)
        assert same(read(folder), models[stop])
        assert state_digest(state_of(open_checkpoint(folder))) == chain.manifest.states()[stop]
    assert [step.stop for step in chain.way(0, 300).steps] == [100, 200, 300]
    assert chain.verify() == []


def main() -> None:
    """Runs the machines for long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="actions in a row")
    parser.add_argument("--examples", type=int, default=2, help="such rows; the first repeats one action")
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=list(MACHINES))
    options = parser.parse_args()
    for machine in map(MACHINES.__getitem__, options.machine):
        COUNTED.clear()
        REACHED.clear()
        start = time.perf_counter()
        run_state_machine_as_test(machine, settings=many(options.steps, options.examples))
        actions, longest = sum(COUNTED), max(REACHED)
        print(f"{machine.__name__}: {actions:,} actions, {time.perf_counter() - start:.0f} s; up to {longest:,} steps")


if __name__ == "__main__":
    main()
