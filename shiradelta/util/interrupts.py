"""Exceptions from outside: work that none reaches, and signals that clean up before they end a process.

From outside come Ctrl-C, whatever else a signal handler raises, and PyThreadState_SetAsyncExc, which debuggers,
notebooks and timeouts use.  They are raised between any two steps of a thread, in an `except` or a `finally`, too.
"""

from __future__ import annotations

# `_signal` is what `signal` wraps.  The wrappers look up enumerations.
import _signal  # type: ignore[import-not-found]
import os
import signal
import sys
import threading
import time
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import call
from queue import SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


def uninterrupted(*works: Callable[[], Result]) -> list[Result]:
    """Does each work on a thread of its own, which no exception from outside reaches, and waits for all of them.

    An exception that reaches the caller meanwhile is raised when all works have ended.  One that comes before they
    begin is raised at once.  What has no effect unless it is whole thus needs no `finally`.

    Only two exceptions from outside within microseconds, in the main thread, may end the call early.  A work for which
    no thread can be started is done by the calling thread.

    Args:
        works: functions without arguments.  They may wait for others, and call this function.

    Returns:
        What the works return, in their order.

    Raises:
        BaseException: that from outside, or else that of the first work that failed.
    """
    jobs = [Job(work) for work in works]
    steps: list[Callable[[], object]] = [job.start for job in jobs]
    for job in jobs:
        steps += job.ended.acquire, job.ended.release
    done: list[object] = []
    caught: BaseException | None = None
    while len(done) < len(steps):
        try:
            # One call of C code: between its steps nothing is raised.  If a signal's handler raises while a step waits,
            # the list has the steps before, and the wait begins again.
            done.extend(map(call, steps[len(done) :]))
        except BaseException as error:
            if not done:
                raise
            caught = caught or error
    try:
        if caught is not None:
            raise caught
        return [job.result() for job in jobs]
    finally:
        del caught  # its traceback refers to this frame
        for job in jobs:
            job.error = None


class Job(Generic[Result]):
    """A work on a thread of its own, which no exception from outside reaches, and how it ended.

    Attributes:
        start: lets the work begin; called once.
        ended: a lock that is held until the work has ended.
        error: what it raised.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self.error: BaseException | None = None
        self.ended = allocate_lock()
        self.ended.acquire()
        self._result: Result
        self._work = [work]  # until it begins
        self._thread = _idle_thread()
        self.start: Callable[[], None] = self.run if self._thread is None else partial(self._thread.jobs.put, self)

    def run(self) -> None:
        """Does the work; then the thread is free for another."""
        try:
            self._result = self._work.pop()()
        except BaseException as error:
            self.error = error
        del self.start  # it refers to this job
        thread, self._thread = self._thread, None
        if thread is not None:
            _idle.append(thread)
        self.ended.release()

    def result(self) -> Result:
        """What the work returned, or raised, when it has ended."""
        with self.ended:
            pass
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error  # its traceback refers to this frame

    def give_up(self) -> None:
        """Waits for the end of the work, unless it has not begun: then it never does."""
        try:
            self._work.pop()
        except IndexError:
            self.ended.acquire()


class _Thread:
    """A thread that does one job after the other.  Starting a thread takes longer than a small switch.

    Signal handlers run in the main thread only, and `threading` does not list this one, so nobody interrupts it.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        ready = allocate_lock()
        ready.acquire()
        started = False
        while not started:
            start_new_thread(_serve, (self.jobs, ready))
            # Before CPython 3.12 a new thread has its parent's identity for a moment.  An exception that is set in the
            # parent then ends the new thread instead.
            started = ready.acquire(timeout=1)

    def __del__(self) -> None:
        """Ends the thread, if an exception came between here and its first job."""
        if not sys.is_finalizing():
            self.jobs.put(None)


def _serve(jobs: SimpleQueue[Job[Any] | None], ready: Any) -> None:
    ready.release()
    while (job := jobs.get()) is not None:
        job.run()
        del job


#: Threads without a job.
_idle: list[_Thread] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork


def _idle_thread() -> _Thread | None:
    """A thread for a job; None if none can be started."""
    try:
        return _idle.pop()
    except IndexError:
        pass
    try:
        return _Thread()
    except (RuntimeError, MemoryError):
        return None


@contextmanager
def interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Holds signals back within the block; its end delivers them to their handlers.

    The context gives a function that delivers earlier.  Handlers may raise, as that of Ctrl-C does.  Only the main
    thread runs handlers and may change them, so in other threads the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handlers = {number: own for number in range(1, signal.NSIG) if callable(own := _signal.getsignal(number))}
    held: list[tuple[int, FrameType | None]] = []

    def deliver() -> None:
        while held:
            number, frame = held.pop(0)
            handlers[number](number, frame)

    try:
        for number in handlers:
            _signal.signal(number, lambda number, frame: held.append((number, frame)))
        yield deliver
    finally:
        for number, handler in handlers.items():
            _signal.signal(number, handler)
        deliver()


#: Seconds after which a signal that was dropped is sent again.
_AGAIN = 0.02


class _Terminated(SystemExit):
    """A signal has ended the process."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def terminations_raised() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP raise SystemExit within the block, so that temporary files are removed.

    A handler of someone else's, or a signal that is ignored, is left alone.  Only the main thread may do this; in
    others the context does nothing.  Python drops what is raised in a destructor, so the signal is sent again then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in replaced:
            signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        raise _Terminated(number)

    def dropped(about: sys.UnraisableHookArgs) -> None:
        if not isinstance(about.exc_value, _Terminated):
            hook(about)
            return
        # Later, for what is raised in here is dropped as well.  `Thread.start` would wait.
        start_new_thread(send_again, (about.exc_value.number,))
        for each in replaced:
            signal.signal(each, stop)

    def send_again(number: int) -> None:
        time.sleep(_AGAIN)
        while not ended:
            os.kill(os.getpid(), number)  # ignored once `stop` has raised elsewhere
            time.sleep(_AGAIN)

    ended = False
    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    replaced = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        ended = True
        sys.unraisablehook = hook
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
