"""Work that no exception from outside reaches: it ends, and then the exception is raised."""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from shiradelta.util import interrupts
from shiradelta.util.interrupts import terminations_raised, uninterrupted
from shiradelta.util.threads import ahead, in_ranges, map_in_threads


class Outside(BaseException):
    """What is raised in a thread from outside."""


def raise_in(thread: int) -> None:
    """Lets `Outside` be raised in a thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Outside))


def ctrl_c(thread: int) -> None:
    """Lets KeyboardInterrupt be raised in the main thread, again and again while it waits."""
    for _ in range(5):
        signal.pthread_kill(thread, signal.SIGINT)
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_results_are_in_order_and_works_may_nest():
    def one(number: int) -> list[int]:
        return uninterrupted(*(partial(pow, number, exponent) for exponent in range(3)))

    assert uninterrupted() == []
    assert uninterrupted(*(partial(one, number) for number in range(5))) == [[1, n, n * n] for n in range(5)]


def test_the_first_failure_is_raised_when_all_have_ended():
    ended: list[str] = []

    def fail(name: str, seconds: float) -> None:
        time.sleep(seconds)
        ended.append(name)
        raise ValueError(name)

    with pytest.raises(ValueError, match="slow"):
        uninterrupted(partial(fail, "slow", 0.02), partial(fail, "quick", 0))
    assert ended == ["quick", "slow"]


@pytest.mark.parametrize("interrupt", [raise_in, ctrl_c])
@pytest.mark.parametrize(
    "call",
    [
        lambda work: uninterrupted(partial(work, 0), partial(work, 1)),
        lambda work: in_ranges(lambda first, last: work(first), 2, 2),
        lambda work: map_in_threads(work, range(2), 2),
        lambda work: list(ahead(work, range(2))),
    ],
    ids=["uninterrupted", "in_ranges", "map_in_threads", "ahead"],
)
def test_all_work_has_ended_when_an_exception_from_outside_is_raised(
    call: Callable[[Callable[[int], None]], object], interrupt: Callable[[int], None]
):
    caller, under_way = threading.get_ident(), []

    def work(number: int) -> None:
        under_way.append(number)
        if number:
            interrupt(caller)
        time.sleep(0.02)
        under_way.remove(number)

    with pytest.raises((Outside, KeyboardInterrupt)):
        call(work)
    assert under_way == []


def test_threads_are_used_again_and_keep_nothing_alive():
    class Thing:
        pass

    def new() -> tuple[int, Thing]:
        return threading.get_ident(), Thing()

    ((first, thing),) = uninterrupted(new)
    reference = weakref.ref(thing)
    del thing
    ((second, _),) = uninterrupted(new)
    assert first == second != threading.get_ident()
    assert reference() is None

    def fail(thing: Thing) -> None:
        raise ValueError("thing")

    thing = Thing()
    reference = weakref.ref(thing)
    with pytest.raises(ValueError, match="thing"):
        uninterrupted(partial(fail, thing))
    del thing
    uninterrupted(int)  # the thread has let go of the work before
    assert reference() is None


def test_a_thread_that_got_no_work_ends():
    thread = interrupts._Thread()
    before = _thread._count()
    del thread
    deadline = time.monotonic() + 10
    while _thread._count() == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_it_works_after_a_fork():
    code = (
        "import os, sys; from shiradelta.util.interrupts import uninterrupted;"
        "uninterrupted(int, int);"
        "child = os.fork();"
        "uninterrupted(int, int, int);"
        "child or os._exit(7);"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60).returncode == 7


class InterruptedDestructor:
    """Python drops what a destructor raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM to catch")
def test_a_signal_within_a_destructor_is_not_lost():
    with pytest.raises(SystemExit) as ended, terminations_raised():  # noqa: PT012
        InterruptedDestructor()
        time.sleep(5)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
