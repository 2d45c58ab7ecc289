"""Holds signals back while a change is half done, and lets those that end a process clean up first."""

from __future__ import annotations

# `_signal` is what `signal` wraps.  The wrappers look up enumerations, which for all signals takes longer than a small
# switch.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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


@contextmanager
def terminations_raised() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP raise SystemExit within the block, so that temporary files are removed.

    A handler of someone else's, or a signal that is ignored, is left alone.  Only the main thread may do this; in
    others the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in replaced:
            signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    replaced = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
