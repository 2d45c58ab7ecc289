"""The receiver: slime's steps become those of a chain, a folder follows it, and an engine gets its newest version."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import shiradelta as sd
from examples.serve_chain.engines import POLICIES, Engine, Layer
from shiradelta.chain import Chain, FolderFollower
from shiradelta.chain.rows import Step
from shiradelta.chain.way import Way, cheapest
from shiradelta.chain.wires.registry import read_wire

#: The most steps on the engine's weights, each of which keeps what it overwrote; beyond, one from the first version.
MOST_LAYERS = 8


class Receiver:
    """What answers slime's requests; one at a time.

    Args:
        chain: the steps so far; version 0 is the model that the engine was started with.
        folder: the model's folder, which is taken from version to version; a new one begins with an anchor.
        engine: what runs the model.
        source: the folder in which slime writes `weight_vNNNNNN`; None if the chain is published by someone else.
        policy: what becomes of generation in flight where a request does not say.

    Attributes:
        paused: whether generation is held back.
    """

    def __init__(
        self, chain: Chain, folder: Path, engine: Engine, source: Path | None = None, policy: str = "finish"
    ) -> None:
        self.chain, self.folder, self.source, self.policy = chain, folder, source, policy
        self._engine, self._follower, self._lock = engine, FolderFollower(chain, folder), Lock()
        self.paused, self._asked = False, False
        self._layers: tuple[Layer, ...] = ()

    @property
    def version(self) -> int:
        """The version that the engine has, once the first update has asked it."""
        return self._layers[-1].stop if self._layers else 0

    def pull(self, target: int) -> None:
        """Takes the folder to a version, step by step; each is wholly on it or not at all.

        Raises:
            ShiraDeltaError: a step is missing, damaged, or was made for other weights.
        """
        with self._lock:
            self.chain.refresh()
            if self.source is not None:
                self._follower.follow()
                for version in range(self.chain.head + 1, target + 1):
                    self._import(self.source / f"weight_v{version:06d}", version)
                    self._follower.follow()
            self._follower.follow(target)

    def _import(self, step: Path, version: int) -> None:
        if not step.is_dir():
            raise sd.SourceError(f"{step} is not there; write version {version} first")
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "step.shd"
            read_wire("slime", step, self.folder, path)
            self.chain.publish(path, version=version)

    def pause(self, policy: str | None = None) -> None:
        """Lets generation in flight finish, or aborts it; then weights can change.

        Raises:
            ArgumentError: there is no such policy.
        """
        policy = policy or self.policy
        if policy not in POLICIES:
            raise sd.ArgumentError(
                f"generation in flight cannot be {policy!r}: an answer has the weights of one version; take one of"
                f" {', '.join(POLICIES)}"
            )
        with self._lock:
            self._engine.pause(policy)
            self.paused = True

    def flush(self) -> None:
        """Lets the engine forget what it computed with other weights."""
        with self._lock:
            self._engine.flush()

    def resume(self) -> None:
        """Lets generation go on."""
        with self._lock:
            self._engine.resume()
            self.paused = False

    def update(self, target: int | None = None) -> int:
        """Gives the engine the version that the folder has; returns it.

        Where nobody has paused generation, that is done here, and the cache is reset.

        Args:
            target: the version that the folder is expected to have.

        Raises:
            ArgumentError: it has another one.
            EngineError: the engine has refused it; its weights are as before.
        """
        with self._lock:
            version = self._follower.version or 0
            if target not in (None, version):
                raise sd.ArgumentError(f"the folder is version {version}, not {target}; pull that version first")
            if not self._asked:  # it may have run longer than this process
                self._layers, self._asked = self._engine.active(), True
            if version != self.version:
                self._switch(version)
            return version

    def _switch(self, version: int) -> None:
        kept, steps = self._way(version)
        files, needs_base = {}, False
        for step in steps:
            path = self.chain.store.fetched(step.path, step.bytes, step.sha256)
            files[Layer(step.start, step.stop)] = path
            with sd.open_delta(path) as delta:
                needs_base |= delta.needs_base
        # What is read with the version before it only is loaded when that is on the weights.
        stages = [[layer] for layer in files] if needs_base else [[*files]]
        paused = self.paused
        if not paused:
            self._engine.pause(self.policy)
        try:
            for new in stages:
                after = (*kept, *new)
                self._engine.apply(self._layers, after, {layer: files[layer] for layer in new})
                kept = self._layers = after
            self._engine.flush()
        finally:
            if not paused:
                self._engine.resume()

    def _way(self, version: int) -> tuple[tuple[Layer, ...], Sequence[Step]]:
        """(the engine's layers that stay, the steps that come on them): what takes the fewest bytes to load."""
        found = []
        for count in range(len(self._layers) + 1):
            kept = self._layers[:count]
            start = kept[-1].stop if kept else 0
            way = Way(None, ()) if start == version else cheapest(self.chain.manifest, start, version)
            if way is not None and count + len(way.steps) <= MOST_LAYERS:
                found.append((way.bytes, kept, way.steps))
        if found:
            _, kept, steps = min(found, key=lambda each: each[0])
            return kept, steps
        return (), [self.chain.fold(0, version)]
