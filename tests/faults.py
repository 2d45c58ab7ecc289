"""Lets one system call after the other fail, and says what a folder must be afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shiradelta
from shiradelta.folder.listing import recorded
from tests import BRIEF
from tests.scenes import weights

#: Every how many calls one fails in a scenario that is not `QUICK`.
STRIDE = 20 if BRIEF else 1
#: Functions of `os` that change something; writes of streams fail in `fdopen`'s.
WRITES = (
    "open",
    "replace",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
    "fsync",
    "fchmod",
    "posix_fallocate",
    "copy_file_range",
)
#: Functions of `os` that look at something.
READS = ("listdir", "stat", "fstat")


class _Stream:
    """A stream whose writes can fail."""

    def __init__(self, stream: Any, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, data: bytes) -> int:
        self._check()
        return self._stream.write(data)


class Faults:
    """Counts system calls.  The one with number `at` fails, and with `persistent` all after it, too."""

    def __init__(self, at: int, error: int, persistent: bool) -> None:
        self.at, self.error, self.persistent = at, error, persistent
        self.calls = 0

    @property
    def hit(self) -> bool:
        """Whether one has failed."""
        return self.calls >= self.at

    def check(self) -> None:
        """Fails if it is time."""
        self.calls += 1
        if self.calls == self.at or (self.persistent and self.calls > self.at):
            raise OSError(self.error, os.strerror(self.error))


@contextmanager
def failing(at: int, error: int, calls: tuple[str, ...], *, persistent: bool) -> Iterator[Faults]:
    """Lets system calls fail within the block: functions of `os`, and writes of streams."""
    faults = Faults(at, error, persistent)
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            real = getattr(os, name)

            def call(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
                faults.check()
                return real(*args, **options)

            patch.setattr(os, name, call)
        # `call` is not in the sets of what takes a descriptor; they are only read when modules are loaded.
        fdopen = os.fdopen
        patch.setattr(os, "fdopen", lambda *args, **options: _Stream(fdopen(*args, **options), faults.check))
        yield faults


def check_true(model: Path, states: list[dict[str, bytes]]) -> None:
    """Checks that `verify` says what the weights are: `states` holds them with 0, 1, ... deltas applied."""
    found = weights(model)
    report = shiradelta.verify(model)
    assert weights(model) == found
    if report.state == "neither":
        assert report.interrupted, report
    else:
        nothing = "base" if recorded(model).base else "unknown"
        assert report.state == ("patched" if report.applied else nothing), report
        assert found == states[len(report.applied)], report


def take_all_out(model: Path, base: dict[str, bytes]) -> None:
    """Reverts until nothing is left; then the weights must be the base's."""
    report = shiradelta.verify(model)
    if report.interrupted:
        shiradelta.revert(model)
    for _ in shiradelta.verify(model).applied:
        shiradelta.revert(model)
    assert weights(model) == base
