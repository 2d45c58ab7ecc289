"""Signals, held back while a change is half done."""

from __future__ import annotations

# What `signal` wraps: the wrappers look up enumerations, for all signals in more time than a small switch takes.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Gives a function that delivers signals that came since to their handlers; the block's end does too.

    A handler may raise: at Ctrl-C, when a time is up.  Only the main thread runs any, and only it may change them.
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
