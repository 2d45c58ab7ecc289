"""Exceptions that reach a switch from outside, at random moments, in the main thread and in others.

After each, the weights must be what the session says, bit for bit, on every backend of the CPU, and no thread may be
left at work.  `python -m tests.hotswap.interrupts --count 5000` prints how it went.  In 16 processes: each with
`--count 313` and a seed of its own, `--seed 0` to `--seed 15`.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

import shiradelta as sd
from tests.swapping import adapter, bits, random_delta

#: So many nonzeros a tensor that libshd works on several threads.
SHAPE, NONZEROS = (1024, 1024), 140_000
#: What is active, in turn: single adapters, sums, other strengths of the same, the base, a successor, one of that.
STATES: list[dict[str, float]] = [
    {"a": 1.0},
    {"b": 0.5},
    {"a": 1.0, "b": 1.0},
    {"a": 0.5, "b": -1.0},
    {"a": 1.0, "next": 1.0},
    {"a": 1.0, "next": 1.0, "last": 1.0},
    {"a": 2.0},
    {},
]


class Interrupted(BaseException):
    """What is raised in a thread from outside."""


class Session:
    """A session on two tensors, and the bits of every state."""

    def __init__(self, backend: str, nonzeros: int = NONZEROS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in "vw"}
        self.swap = sd.HotSwap(self.model, backend=backend)
        for seed, name in enumerate("ab"):
            deltas = {key: random_delta(SHAPE, nonzeros, 2 * seed + i) for i, key in enumerate(self.model)}
            self.swap.load(name, adapter(deltas))
        for seed, beneath, name in ((9, "a", "next"), (11, "next", "last")):
            self.swap.switch(beneath)
            following = {
                key: random_delta(SHAPE, nonzeros, seed + i, base=now)
                for i, (key, now) in enumerate(self.model.items())
            }
            assert self.swap.load(name, adapter(following)).beneath
        self.expected = {}
        spans = []
        for state in [*STATES, *STATES]:
            start = time.perf_counter()
            self.swap.switch(state)
            spans.append(time.perf_counter() - start)
            self.expected[_key(state)] = self.bits()
        self.span = sorted(spans[len(STATES) :])[len(STATES) // 2]

    def bits(self) -> list[np.ndarray]:
        """Of all tensors."""
        return [bits(tensor) for tensor in self.model.values()]

    def outcome(self, before: Mapping[str, float], wanted: Mapping[str, float]) -> str:
        """What an interrupted switch left, as the session says it, if that is so."""
        try:
            active = self.swap.active
            self.swap.changed()
        except sd.TargetError:
            return "broken, and says so"
        now = self.bits()
        if not all(map(np.array_equal, now, self.expected[_key(active)])):
            return "NOT WHAT IT SAYS"
        if active == before:
            return "as before"
        return "as wanted" if active == wanted else "ANOTHER STATE"


def _key(state: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(state.items()))


def by_signal(thread: int) -> None:
    """Ctrl-C."""
    signal.pthread_kill(thread, signal.SIGINT)


def by_exception(thread: int) -> None:
    """What debuggers, notebooks and timeouts do."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interrupted))


def interrupted_switch(
    session: Session, wanted: Mapping[str, float], interrupt: Callable[[int], None], after: float
) -> bool:
    """Switches; another thread interrupts this one so many seconds later.  Whether that came before the end."""
    here, begun, sent = threading.get_ident(), threading.Event(), threading.Event()

    def send() -> None:
        begun.wait()
        time.sleep(after)
        interrupt(here)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    within = False
    try:
        begun.set()
        try:
            session.swap.switch(wanted)
        except (Interrupted, KeyboardInterrupt):
            within = True
        while True:  # until it comes, if it comes late
            time.sleep(1e-5)
            if within and sent.is_set():
                break
    except (Interrupted, KeyboardInterrupt):
        pass
    while sender.is_alive():
        sender.join(1)
    return within


def interrupt_repeatedly(
    new_session: Callable[[], Session], interrupt: Callable[[int], None], count: int, seed: int
) -> Counter[str]:
    """Interrupts so many switches; how often which outcome.

    Args:
        new_session: gives a session, and another one where the last has come to harm.
        interrupt: does it to a thread.
        count: how many.
        seed: decides at which moments.
    """
    generator = random.Random(seed)
    session, seen = new_session(), Counter[str]()
    active, threads = dict(session.swap.active), {*threading.enumerate()}
    while seen.total() < count:
        wanted = generator.choice([state for state in STATES if state != active])
        if not interrupted_switch(session, wanted, interrupt, generator.uniform(0, session.span)):
            active = dict(session.swap.active)
            assert active == wanted
            continue
        left = len({*threading.enumerate()} - threads)  # others, of earlier tests, may end meanwhile
        outcome = session.outcome(active, wanted)
        seen[outcome if not left else f"{outcome}; {left} THREADS LEFT AT WORK"] += 1
        if outcome not in ("as before", "as wanted"):
            session = new_session()
        active = dict(session.swap.active)
    return seen


def in_another_thread(work: Callable[[], Any]) -> Any:
    """The result of `work` on a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a background job, and threads take turns often."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGINT, handler)


#: Where a switch runs, and what interrupts it there.
WAYS: dict[str, tuple[Callable[[Callable[[], Any]], Any], Callable[[int], None]]] = {
    "main thread, Ctrl-C": (lambda work: work(), by_signal),
    "main thread, PyThreadState_SetAsyncExc": (lambda work: work(), by_exception),
    "another thread, PyThreadState_SetAsyncExc": (in_another_thread, by_exception),
}


def main() -> None:
    """The full run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="each gives other moments and states")
    parser.add_argument("--backend", nargs="+", default=["numpy", "libshd", "torch"])
    options = parser.parse_args()
    runs = [(backend, way) for backend in options.backend for way in WAYS]
    failed = False
    with interruptible():
        for number, (backend, way) in enumerate(runs):
            count = options.count * (number + 1) // len(runs) - options.count * number // len(runs)
            faulthandler.dump_traceback_later(60 + count, exit=True)  # a hang ends the run
            where, interrupt = WAYS[way]
            seed = options.seed * len(runs) + number
            seen = where(lambda: interrupt_repeatedly(partial(Session, backend), interrupt, count, seed))  # noqa: B023
            for outcome, times in sorted(seen.items()):
                failed |= outcome not in ("as before", "as wanted")
                print(f"{backend:7} {way:42} {times:5}  {outcome}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
