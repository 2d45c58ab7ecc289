"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

#: A callback that reports how far long work is: (what, done, total).
Progress = Callable[[str, int, int], None]


def part_of(progress: Progress, part: int, parts: int) -> Progress:
    """What reports one of several parts of a work, numbered from 0, so that what is done grows over all of them."""
    return lambda what, done, total: progress(what, part * total + done, parts * total)
