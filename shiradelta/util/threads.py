"""Work on several threads: how many to use, and what happens if one cannot be started.

NumPy, libshd, zlib and file reads release the interpreter's lock, so threads of one process run side by side.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TypeVar

from shiradelta.util.interrupts import Job, uninterrupted

#: Threads that one call uses at most: the processors of this process, up to 16.
THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)

Item = TypeVar("Item")
Result = TypeVar("Result")


def share_processors() -> None:
    """Lets torch's threads give up their processors soon when they wait for each other, if torch is not imported yet.

    By default GNU's OpenMP, which torch brings on Linux, spins for a millisecond first.  Where other work takes one of
    the processors, or a container has a part of them only, threads then spin instead of working.  What the environment
    says of it is left alone.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def in_ranges(work: Callable[[int, int], None], units: int, threads: int = THREADS) -> None:
    """Calls `work(first, last)` for consecutive ranges that cover 0 to `units` once, each on its own thread.

    All ranges have ended when the call ends, whatever is raised; see `uninterrupted`.
    """
    count = max(min(threads, units), 1)
    if count == 1:
        work(0, units)
    else:
        edges = [units * i // count for i in range(count + 1)]
        uninterrupted(*(partial(work, *edge) for edge in pairwise(edges)))


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int = THREADS) -> list[Result]:
    """`[work(item) for item in items]` on several threads.  Each takes one share: single items would cost more."""
    count = min(threads, len(items))
    if count < 2:
        return [work(item) for item in items]

    def do(share: Sequence[Item]) -> list[Result]:
        return [work(item) for item in share]

    done = uninterrupted(*(partial(do, items[i::count]) for i in range(count)))
    return [done[i % count][i // count] for i in range(len(items))]


@contextmanager
def meanwhile(
    work: Callable[[Item], object], items: Sequence[Item], first: Callable[[Item], object] = lambda item: None
) -> Iterator[None]:
    """Does `work(item)` for each item, on a thread of its own, while the block runs; the block's end waits for all.

    The block runs once `first(item)` has been done for all of them, on these threads, too, and not at all if it failed
    for one.  So the block waits in any case until all have begun: a block that is Python would keep them from it, by
    the interpreter's lock, for milliseconds.  An exception of the block is raised before that of a work.
    """
    all_begun, begun = allocate_lock(), iter(range(len(items)))
    failed: list[Item] = []

    def begin(item: Item) -> None:
        try:
            first(item)
        except BaseException:
            failed.append(item)
            raise
        finally:
            # Only the last one wakes the block, which would take the interpreter's lock from the others each time.
            if next(begun) == len(items) - 1:
                all_begun.release()
        work(item)

    jobs = [Job(partial(begin, item)) for item in items]
    if jobs:
        all_begun.acquire()
    for job in jobs:
        job.start()
    try:
        with all_begun:
            pass
        if not failed:
            yield
    finally:
        for job in jobs:
            with job.ended:
                pass
        for job in jobs if failed else ():
            job.result()
    for job in jobs:
        job.result()


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int = 2) -> Iterator[Result]:
    """Yields `work(item)` in order, while up to `threads` later results are made.

    At most `threads` + 1 results exist at a time, so memory stays small where results are whole tensors.
    """
    waiting: deque[Job[Result]] = deque()

    def give_up() -> None:
        for job in waiting:
            job.give_up()

    def next_result() -> Result:
        result = waiting[0].result()
        waiting.popleft()
        return result

    try:
        for item in items:
            waiting.append(Job(partial(work, item)))
            waiting[-1].start()
            if len(waiting) > threads:
                yield next_result()
        while waiting:
            yield next_result()
    finally:
        uninterrupted(give_up)
