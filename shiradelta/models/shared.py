"""Memory that other processes may write, too."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

_MAPS = Path("/proc/self/maps")
#: Device files; drivers map memory of this process alone from them.  The first two are memory as any other.
_MEMORY, _DEVICES = ("/dev/shm/", "/dev/zero"), "/dev/"


class SharedMemory:
    """The addresses that this process shares with others, or with a file; none where the system has no list of them."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        try:
            lines = _MAPS.read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            where, flags, *rest = line.split(maxsplit=5)
            path = rest[3].decode(errors="replace") if len(rest) > 3 else ""
            if flags.endswith(b"s") and (path.startswith(_MEMORY) or not path.startswith(_DEVICES)):
                start, end = (int(edge, 16) for edge in where.split(b"-"))
                self._starts.append(start)
                self._ends.append(end)

    def __contains__(self, address: int) -> bool:
        at = bisect_right(self._starts, address)
        return at > 0 and address < self._ends[at - 1]
