"""How far long work is: a bar on a terminal, a line now and then elsewhere, both with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from shiradelta.cli.output import echo, is_quiet
from shiradelta.errors import printable
from shiradelta.util.progress import Progress
from shiradelta.util.text import duration

if TYPE_CHECKING:
    from rich.progress import Task

#: Seconds after which a bar appears, and between two states of it.
_BAR_AFTER, _BAR_EVERY = 0.3, 0.1
#: Seconds after which the first line is printed where there is no terminal, and between two lines.
_LINE_AFTER, _LINE_EVERY = 10.0, 30.0
#: Columns of the terminal from which the name of what is worked on fits beside the bar.
_WIDE = 100


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress callback that draws a bar on a terminal, and prints lines elsewhere.  Short work shows neither."""
    if is_quiet():
        yield lambda what, done, total: None
        return
    with ExitStack() as stack:
        yield (_Bar(label, stack) if sys.stderr is not None and sys.stderr.isatty() else _Lines(label)).step


class _Lines:
    """Prints a line now and then."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.next = time.monotonic() + _LINE_AFTER
        self.begun, self.first, self.last = time.monotonic(), 0, (0, 0)

    def step(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self.last[0] or total != self.last[1]:  # other work
            self.begun, self.first = now, done
        self.last = done, total
        if now < self.next:
            return
        self.next = now + _LINE_EVERY
        line = f"{self.label}: {done:,} of {total:,} ({done / max(total, 1):.0%})"
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        if rate > 0:
            line += f", {rate:.3g} a second, {duration((total - done) / rate)} left"
        echo(f"{line}; {printable(str(what))}", err=True)


class _Bar:
    """Draws a bar, in this thread; rich is imported once it appears."""

    def __init__(self, label: str, stack: ExitStack) -> None:
        self.label, self.stack = label, stack
        self.next = time.monotonic() + _BAR_AFTER
        self.last = 0, 0
        self.drawn: Any = None

    def step(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        other = done < self.last[0] or total != self.last[1]
        self.last = done, total
        if self.drawn is None and now >= self.next:
            self.drawn = self.stack.enter_context(_rich_bar())
            self.drawn.add_task(self.label, total=total, completed=done, what="")
        if self.drawn is None:
            return
        if other:
            self.drawn.reset(0, total=total)
        self.drawn.update(0, completed=done, what=printable(str(what))[-48:])
        if now >= self.next:
            self.next = now + _BAR_EVERY
            self.drawn.refresh()


def _rich_bar() -> Any:
    """A bar of rich with rate and time left, which vanishes in the end."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class RateColumn(ProgressColumn):
        """Steps a second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(5, min(30, console.width - 45))),
        TextColumn("{task.percentage:>3.0f}%"),
        RateColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    ]
    if console.width >= _WIDE:
        columns.append(TextColumn("{task.fields[what]}", markup=False))
    return RichProgress(*columns, console=console, auto_refresh=False, transient=True, redirect_stdout=False)
