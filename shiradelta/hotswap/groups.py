"""Groups of processes that talk by gloo, each with a timeout that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

#: How many timeouts of its group gloo waits for a connection; and the shortest timeout that is set for connecting.
_GLOO_WAITS, _LEAST_TO_CONNECT = 5, 1.0

#: (ranks, timeout) -> a gloo group.  All sessions of a process share it, and it stays: the names of groups depend on
#: those that exist, and would differ between processes that forget a session at different times.
_groups: dict[tuple[tuple[int, ...], float], Any] = {}


def group_of(ranks: tuple[int, ...], timeout: float) -> Any:
    """A gloo group of these ranks of the default group.

    Raises:
        RuntimeError: a rank did not come within the timeout, or has ended.
    """
    import torch.distributed as dist

    key = ranks, timeout
    with suppress(KeyError, ValueError):
        dist.get_rank(_groups[key])  # a ValueError if it belonged to an earlier default group
        return _groups[key]
    with _all_here(ranks, timeout):  # so connecting takes no time, unless one ends now
        connect = min(timeout, max(timeout / _GLOO_WAITS, _LEAST_TO_CONNECT))
        group = dist.new_group(list(ranks), timedelta(seconds=connect), "gloo", use_local_synchronization=True)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    _groups[key] = group
    return group


def forget_group(ranks: tuple[int, ...], timeout: float) -> None:
    """Lets the next `group_of` make a new group: this one is lost."""
    _groups.pop((ranks, timeout), None)


@contextmanager
def _all_here(ranks: tuple[int, ...], timeout: float) -> Iterator[None]:
    """A context that starts when all ranks have come to it.

    Raises:
        RuntimeError: one did not come within the timeout.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    keys = {rank: f"shiradelta/here/{'-'.join(map(str, ranks))}/{rank}" for rank in ranks}
    own = keys[dist.get_rank()]
    store.set(own, "")
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout))
        yield
    finally:
        with suppress(Exception):  # not every store deletes
            store.delete_key(own)  # the next group is waited for anew
