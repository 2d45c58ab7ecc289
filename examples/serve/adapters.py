"""Adapters of one folder, loaded and evicted while the service runs."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import shiradelta as sd
from examples.serve.batches import UnknownAdapterError
from examples.serve.limits import Limits
from shiradelta.hotswap.reports import LoadReport

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Adapters:
    """The adapters of a folder: `NAME.shd` is the adapter NAME.  Nothing else can be loaded.

    The methods that change something are for the thread that owns the model (`Batcher.call`).

    Args:
        swap: the model's session.
        folder: where the files are; None for a service without adapters.
        limits: `adapters` and `adapter_bytes` of them.
        keys: files of public keys; only what one of them has signed is loaded.  None for any file of the folder.
    """

    def __init__(
        self, swap: sd.HotSwap, folder: Path | None, limits: Limits | None = None, keys: Sequence[Path] | None = None
    ) -> None:
        self._swap, self._limits, self._keys = swap, limits or Limits(), keys
        self._folder = None if folder is None else folder.resolve()
        self._used = OrderedDict.fromkeys(swap.loaded)  # the least recently used first

    def file(self, name: str) -> Path:
        """The file of a name.

        Raises:
            UnknownAdapterError: the folder has no such adapter.
        """
        if self._folder is None or not _NAME.fullmatch(name):
            raise UnknownAdapterError(name)
        path = (self._folder / f"{name}.shd").resolve()  # a link may lead elsewhere
        if path.parent != self._folder or not path.is_file():
            raise UnknownAdapterError(name)
        return path

    def available(self) -> list[str]:
        """The names of all adapters in the folder."""
        found = [] if self._folder is None else sorted(path.stem for path in self._folder.glob("*.shd"))
        return [name for name in found if _NAME.fullmatch(name)]

    def use(self, name: str) -> None:
        """Notes that an adapter is used now."""
        if name in self._used:
            self._used.move_to_end(name)

    def load(self, name: str) -> LoadReport:
        """Loads an adapter, if it is not loaded, and evicts others where there is no room.

        Raises:
            UnknownAdapterError: the folder has no such adapter.
            ShiraDeltaError: the file is damaged, does not fit the model, or is not signed.
            MemoryError: it takes more memory alone than all adapters may.
        """
        if name not in self._swap.loaded:
            report = self._swap.load(name, self.file(name), key=self._keys)
            if report.nbytes > self._limits.adapter_bytes:
                self._swap.unload(name)
                raise MemoryError(f"it takes {report.nbytes:,} bytes of {self._limits.adapter_bytes:,}")
            self._used[name] = None
        self.use(name)
        while len(self._used) > self._limits.adapters or self._bytes() > self._limits.adapter_bytes:
            self.evict(next(iter(self._used)))
        return self._swap.loaded[name]

    def evict(self, name: str) -> None:
        """Takes an adapter out of memory; off the weights first, if it is on them.

        Raises:
            UnknownAdapterError: it is not loaded.
        """
        if name not in self._swap.loaded:
            raise UnknownAdapterError(name)
        if name in self._swap.active:
            self._swap.revert()
        self._swap.unload(name)
        self._used.pop(name, None)

    def _bytes(self) -> int:
        return sum(report.nbytes for report in self._swap.loaded.values())
