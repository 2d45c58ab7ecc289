"""A switch that an exception from outside reaches; `python -m tests.hotswap.interrupts` does this 5,000 times."""

from __future__ import annotations

import threading
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from shiradelta import HotSwap
from shiradelta.backends.libshd.library import describe_system
from shiradelta.hotswap.devices import Devices
from shiradelta.hotswap.layers import Held
from tests.hotswap.interrupts import (
    WAYS,
    Interrupted,
    Session,
    by_exception,
    in_another_thread,
    interrupt_repeatedly,
    interruptible,
)
from tests.swapping import adapter, bits, random_delta

libshd = pytest.param("libshd", marks=pytest.mark.skipif(describe_system()["backend"] != "libshd", reason="not built"))
CPU_BACKENDS = ["numpy", libshd, "torch"]


@cache
def session(backend: str) -> Session:
    """One for all ways: each leaves it as it says, or has failed."""
    return Session(backend, 70_000)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_weights_are_what_the_session_says(backend: str, way: str):
    where, interrupt = WAYS[way]
    with interruptible():
        seen = where(lambda: interrupt_repeatedly(partial(session, backend), interrupt, 5, 0))
    assert set(seen) <= {"as before", "as wanted"}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_work_that_is_only_queued_is_done_by_the_caller(monkeypatch: pytest.MonkeyPatch, way: str):
    """As on a GPU."""
    monkeypatch.setattr(Devices, "only_queue", True)
    where, interrupt = WAYS[way]
    with interruptible():
        seen = where(lambda: interrupt_repeatedly(partial(session, "torch"), interrupt, 8, 0))
    assert set(seen) <= {"as before", "as wanted"}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("main", [True, False])
def test_it_is_raised_when_the_weights_are_as_before(
    monkeypatch: pytest.MonkeyPatch, backend: str, at: int, main: bool
):
    """`applied` ends with the weights from before, too, if the exception reaches it on its way out."""
    model = {"w": torch.randn((40, 30)).bfloat16()}
    swap = HotSwap(model, backend=backend)
    swap.load("a", adapter({"w": random_delta((40, 30), 100, 0)}))
    before, calls, own = bits(model["w"]), [], Held.check_model

    def interrupted(held: Held) -> None:
        """After the weights are written."""
        calls.append(held)
        if len(calls) == at:
            by_exception(switching[0])
        own(held)

    switching: list[int] = []

    def switch() -> list[Any]:
        switching.append(threading.get_ident())
        with pytest.raises(Interrupted), swap.applied("a"):
            pass
        return [swap.active, bits(model["w"])]

    monkeypatch.setattr(Held, "check_model", interrupted)
    active, now = switch() if main else in_another_thread(switch)
    assert len(calls) == at
    assert active == {}
    assert np.array_equal(now, before)
