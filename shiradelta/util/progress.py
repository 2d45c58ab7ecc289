"""How far long work is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (what, done, total) while work goes on.
Progress = Callable[[str, int, int], None]
