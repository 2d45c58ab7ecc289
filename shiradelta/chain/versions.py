"""Versions of a chain as models on disk, built from an anchor and steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shiradelta.chain.files import write_anchor
from shiradelta.chain.rows import Step
from shiradelta.chain.stores import Store
from shiradelta.chain.way import Way
from shiradelta.folder.apply import apply
from shiradelta.folder.commit import commit
from shiradelta.io.reader import Delta
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint


class Versions:
    """One version after the other, in a folder that goes from each to the next as far as steps lead there.

    Args:
        store: the chain's store.
        way: (version, version) -> the steps between them; (None, version) -> an anchor and steps.
        opened: opens a step's file.
        folder: a folder of one's own.
    """

    def __init__(
        self, store: Store, way: Callable[[int | None, int], Way], opened: Callable[[Step], Delta], folder: Path
    ) -> None:
        self._store, self._way, self._opened, self._folder = store, way, opened, folder
        self._version, self._count = -1, 0

    def at(self, version: int) -> Checkpoint:
        """A version's model, until the next one is asked for.

        Raises:
            ChainError: no way leads there, or a file is missing or is another one.
        """
        if not 0 <= self._version <= version:
            self._count, self._version = self._count + 1, -1
            way = self._way(None, version)
            self._here.mkdir()
            if way.anchor is not None:
                write_anchor(self._store, way.anchor, self._here)
        else:
            way = self._way(self._version, version)
        for step in way.steps:
            with self._opened(step) as delta:
                self._version = -1  # what fails half-way is no version
                apply(self._here, delta)
            commit(self._here)  # a later step may set the same again
            self._version = step.stop
        self._version = version
        return open_checkpoint(self._here, packed=True)

    @property
    def _here(self) -> Path:
        return self._folder / str(self._count)
