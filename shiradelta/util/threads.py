"""Work on several threads: how many to use, and what happens if one cannot be started.

NumPy, libshd, zlib and file reads release the interpreter's lock, so threads of one process run side by side.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

#: Threads that one call uses at most: the processors of this process, up to 16.
THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_ranges(work: Callable[[int, int], None], units: int, threads: int = THREADS) -> None:
    """Calls `work(first, last)` for consecutive ranges that cover 0 to `units` once, each on its own thread.

    Ranges whose thread cannot be started run on the calling thread, so a system short of threads never leaves the work
    half done.  The first exception is raised when all ranges have ended.
    """
    count = max(min(threads, units), 1)
    edges = [units * i // count for i in range(count + 1)]
    failures: list[BaseException] = []

    def guarded(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as error:
            failures.append(error)

    started, here = [], [(edges[0], edges[1])]
    for part in pairwise(edges[1:]):
        try:
            thread = Thread(target=guarded, args=part)
            thread.start()
            started.append(thread)
        except (RuntimeError, MemoryError):
            here.append(part)
    for part in here:
        guarded(*part)
    for thread in started:
        thread.join()
    if failures:
        raise failures[0]


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int = THREADS) -> list[Result]:
    """`[work(item) for item in items]` on several threads.  Each takes one share: single items would cost more."""
    count = min(threads, len(items))
    if count < 2:
        return [work(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor  # slow: imports logging

    shares = [items[i::count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(lambda share: [work(item) for item in share], shares))
    return [done[i % count][i // count] for i in range(len(items))]


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int = 2) -> Iterator[Result]:
    """Yields `work(item)` in order, while up to `threads` later results are made.

    At most `threads` + 1 results exist at a time, so memory stays small where results are whole tensors.
    """
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
