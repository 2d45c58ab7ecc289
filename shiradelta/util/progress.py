"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

#: A callback that reports how far long work is: (what, done, total).
Progress = Callable[[str, int, int], None]
