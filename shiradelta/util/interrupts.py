"""Holds signals back while a change is half done."""

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
