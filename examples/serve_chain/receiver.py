"""The receiver: slime's steps become those of a chain, a folder follows it, and an engine gets its newest version."""

from __future__ import annotations

import tempfile
from pathlib import Path
from threading import Lock

import shiradelta as sd
from examples.serve_chain.engines import POLICIES, Engine
from shiradelta.chain import Chain, FolderFollower
from shiradelta.chain.wires.registry import read_wire


class Receiver:
    """What answers slime's requests; one at a time.

    Args:
        chain: the steps so far; version 0 is the model that the engine was started with.
        folder: the model's folder, which is taken from version to version; a new one begins with an anchor.
        engine: what runs the model.
        source: the folder in which slime writes `weight_vNNNNNN`; None if the chain is published by someone else.
        policy: what becomes of generation in flight where a request does not say.

    Attributes:
        version: the version that the engine has, once the first update has asked it.
        paused: whether generation is held back.
    """

    def __init__(
        self, chain: Chain, folder: Path, engine: Engine, source: Path | None = None, policy: str = "finish"
    ) -> None:
        self.chain, self.folder, self.source, self.policy = chain, folder, source, policy
        self._engine, self._follower, self._lock = engine, FolderFollower(chain, folder), Lock()
        self.version, self.paused, self._active, self._asked = 0, False, "", False

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
                self._active = self._engine.active()
                self.version, self._asked = int(self._active.removeprefix("version ") or 0), True
            if version != self.version:
                self._switch(version)
            return version

    def _switch(self, version: int) -> None:
        """One step from the first version, so that the engine goes from any version to any other at once."""
        path = None
        if version > 0:
            steps = [step for step in self.chain.manifest.since(0) if (step.start, step.stop) == (0, version)]
            step = steps[0] if steps else self.chain.fold(0, version)
            path = self.chain.store.fetched(step.path, step.bytes, step.sha256)
        name = f"version {version}" if path is not None else ""
        paused = self.paused
        if not paused:
            self._engine.pause(self.policy)
        try:
            self._engine.apply(name, path, self._active)
            self.version, self._active = version, name
            self._engine.flush()
        finally:
            if not paused:
                self._engine.resume()
