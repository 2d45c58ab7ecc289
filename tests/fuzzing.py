"""What all fuzzers share: cases by number, run in a child process with limits, and a command line.

A fuzzer is a function `start` that returns a function (seed, number of a case) -> Report.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from tests.forked import CONTEXT

MEMORY_LIMIT = 256 << 20
CASES_PER_REPORT = 200


class TooSlow(BaseException):
    """Not an Exception, so that nobody catches it on the way."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow; does nothing where the system has no such timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Report:
    """What came of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[int, str]] = field(default_factory=list)  # (case, what)
    slowest: float = 0.0
    done: int = 0

    def add(self, other: Report) -> None:
        """Takes up what came of some more cases."""
        self.outcomes += other.outcomes
        self.problems += other.problems
        self.slowest = max(self.slowest, other.slowest)
        self.done += other.done

    def __str__(self) -> str:
        rows = [f"{count:>9,}  {outcome}" for outcome, count in self.outcomes.most_common()]
        head = f"{self.done:,} files, {len(self.problems)} problems, slowest {self.slowest * 1000:.0f} ms"
        return "\n".join([head, *rows, *(f"case {i}: {what}" for i, what in self.problems)])


Case = Callable[[int, int], Report]
Start = Callable[[], Case]


def judged(i: int, judge: Callable[[], tuple[str, str | None]], seconds: float) -> Report:
    """Runs case i.  `judge` returns (outcome, problem or None); an exception or too much time is a problem, too."""
    began = time.perf_counter()
    try:
        with time_limit(seconds):
            outcome, problem = judge()
    except (Exception, TooSlow):
        outcome, problem = "failure", traceback.format_exc()
    problems = [] if problem is None else [(i, problem)]
    return Report(Counter([outcome]), problems, time.perf_counter() - began, 1)


def _child(start: Start, seed: int, cases: range, end: float, current: Synchronized[int], pipe: Connection) -> None:
    """Sends reports until time.time() is `end`; `current` is the case at which it was if it dies."""
    warnings.simplefilter("error")
    run_case = start()
    limit_memory()
    for first in range(cases.start, cases.stop, CASES_PER_REPORT):
        report = Report()
        for i in range(first, min(first + CASES_PER_REPORT, cases.stop)):
            current.value = i
            report.add(run_case(seed, i))
            if time.time() > end:
                break
        pipe.send(report)
        if time.time() > end:
            break


def limit_memory() -> None:
    """Lets this process have MEMORY_LIMIT more than it has now, where the system can."""
    with suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(
    start: Start,
    seed: int,
    count: int,
    progress: Callable[[Report], None] = lambda report: None,
    seconds: float = math.inf,
) -> Report:
    """All cases in a child process, so that a crash or too much memory is a finding and not the end."""
    total, end = Report(), time.time() + seconds
    while total.done < count:
        current = CONTEXT.Value("q", -1)
        receiver, sender = CONTEXT.Pipe(duplex=False)
        cases = range(total.done, count)
        child = CONTEXT.Process(target=_child, args=(start, seed, cases, end, current, sender), daemon=True)
        child.start()
        sender.close()
        with suppress(EOFError), receiver:
            while True:
                total.add(receiver.recv())
                progress(total)
        child.join()
        if child.exitcode:
            if current.value < total.done:
                raise RuntimeError(f"the child process could not start, exit code {child.exitcode}")
            total.problems.append((current.value, f"the process died, exit code {child.exitcode}"))
            total.done = current.value + 1
        if time.time() > end:
            break
    return total


def show_progress(count: int) -> Callable[[Report], None]:
    """A line that is written over, on a terminal; a line for every twentieth otherwise."""
    began = time.monotonic()
    shown = 0

    def show(report: Report) -> None:
        nonlocal shown
        rate = report.done / (time.monotonic() - began)
        line = f"{report.done:,} of {count:,} cases, {rate:.0f}/s, {len(report.problems)} problems"
        if sys.stderr.isatty():
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        elif report.done * 20 // count > shown:
            shown = report.done * 20 // count
            print(line, file=sys.stderr, flush=True)

    return show


def main(
    arguments: Sequence[str], description: str, count: int, start: Start, keep: Callable[[int, int, Path], object]
) -> int:
    """The command line; the exit code is 1 where there are problems.

    Args:
        arguments: of the command line.
        description: for its help.
        count: cases by default.
        start: the fuzzer; a function that another process can import.
        keep: (seed, case, folder): writes a case's files.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help="number of cases")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="CASE", help="one case, in this process")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to write the files with problems, or --only's")
    options = parser.parse_args(arguments)
    if options.only is None:
        report = run(start, options.seed, options.count, show_progress(options.count), options.seconds)
    else:
        report = start()(options.seed, options.only)
    print(report)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        for i in {i for i, _ in report.problems} if options.only is None else {options.only}:
            keep(options.seed, i, options.keep)
    return 1 if report.problems else 0
