"""A chain, its publisher and its followers against a plain list of arrays, with everything that goes wrong.

Processes die in the middle of a system call and after it, steps come twice, early and late, the middle is pruned, files
are damaged, the store fails.  Whatever a follower has is a version, bit for bit, and every refusal has a name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, pages
from shiradelta.chain.state import state_digest, state_of
from shiradelta.errors import CHAIN_REASONS
from shiradelta.models.checkpoint import open_checkpoint
from tests import BRIEF
from tests.chain.models import Model, add_step, change, read, replayed, same, set_step, small, write

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

    def __init__(self) -> None:
        super().__init__()
        self.small_pages = mock.patch.multiple(pages, PAGE_STEPS=3, NEWEST=1)
        self.small_pages.start()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.rng = np.random.default_rng(0)
        self.number = 0
        self.models: list[Model] = []

    def teardown(self) -> None:
        self.small_pages.stop()
        shutil.rmtree(self.root)

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.models = [{name: one for name, one in small().items() if name != "layers.1.up.weight"}]
        Chain.create(self.root / "chain", write(self.root / "model", self.models[0]))

    @property
    def chain(self) -> Chain:
        """As another process would open it."""
        return Chain.open(self.root / "chain")

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
            assert error.reason in reasons, error  # noqa: PT017
            assert error.reason in CHAIN_REASONS  # noqa: PT017
            return True
        return False

    # ------------------------------------------------------------------------------------ the publisher

    @rule(adds=st.booleans(), moment=MOMENTS)
    def publish(self, adds: bool, moment: int | None) -> None:
        path, after = self.step(adds)
        with killed_at(moment):
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
        allowed = ["duplicate", "not_published", "pruned", *([] if has_base else ["needs_base"])]
        with killed_at(moment):
            self.refused(lambda: self.chain.fold(start, stop, base=base), *allowed)

    @rule(number=VERSIONS, moment=MOMENTS)
    def anchor(self, number: int, moment: int | None) -> None:
        model = write(self.path("anchor"), self.models[self.version(number)])
        with killed_at(moment):
            self.refused(lambda: self.chain.publish_anchor(model, self.version(number)), "duplicate", "not_published")

    @rule(number=VERSIONS | st.none(), moment=MOMENTS)
    def collect(self, number: int | None, moment: int | None) -> None:
        with killed_at(moment):
            before = None if number is None else self.version(number)
            self.refused(lambda: self.chain.collect(before), "pruned")

    # ------------------------------------------------------------------------------------- the followers

    @rule(who=st.integers(0, 1), number=VERSIONS | st.none(), keep=st.integers(1, 3), moment=MOMENTS)
    def follow(self, who: int, number: int | None, keep: int, moment: int | None) -> None:
        to = None if number is None else self.version(number)
        with killed_at(moment):
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
        found = (self.root / "chain").rglob("*-*")
        files = [file for file in sorted(found) if file.is_file()] + sorted(
            (self.root / "chain").rglob("*-*/*.safetensors")
        )
        file = files[number % len(files)]
        whole = file.read_bytes()
        if gone:
            file.unlink()
        else:
            at = byte % len(whole)
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        folder = self.path("late")
        try:
            if not self.refused(FolderFollower(self.chain, folder).follow, "missing_file", "wrong_bytes"):
                assert same(read(folder), self.models[-1])
            listed = self.chain.manifest.files()
            assert bool(self.chain.verify()) == (file.relative_to(self.root / "chain").as_posix() in listed)
        finally:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(whole)
            shutil.rmtree(folder, ignore_errors=True)

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


ChainMachine.TestCase.settings = settings(
    max_examples=settings.default.max_examples // 2,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestChain = pytest.mark.slow(ChainMachine.TestCase)


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
