"""Locks on open files against other processes; they end with the descriptor, however the process ends."""

from __future__ import annotations

import errno
import sys

#: What the system says where a file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, shared: bool) -> None:
        """Locks the first byte.  There are no shared locks, so one reader keeps out another."""
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Locks an open file until its descriptor is closed; False if another process has locked it.

    Args:
        descriptor: the file; open for writing unless the lock is shared.
        shared: let others lock it, too, if theirs are shared.

    Raises:
        OSError: the file system has no locks (`NO_LOCKS`), or another failure.
    """
    try:
        _lock(descriptor, shared)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def try_lock_if_possible(descriptor: int, *, shared: bool = False) -> bool:
    """As `try_lock`; True where the file system has no locks, so that nothing keeps others out."""
    try:
        return try_lock(descriptor, shared=shared)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        raise
