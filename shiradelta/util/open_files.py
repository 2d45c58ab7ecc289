"""More open files than the system's soft limit, while many are read at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def open_files(count: int) -> Iterator[None]:
    """A context in which this process may open so many files more, as far as the system's hard limit allows it.

    A file that is mapped into memory counts, too.  Windows has no such limit.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield
        return
    raised = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
    with suppress(ValueError, OSError):  # macOS has a lower limit than the one it names; opening will say so
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    try:
        yield
    finally:
        if resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, hard):  # else another thread has raised it further
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
