"""Followers: take a model's folder, or a live model, from version to version of a chain, a whole step at a time.

Every step is compared with the weights before the first write, and is on them wholly or not at all.  Which version a
folder is stands in the folder's own record, in the same atomic write as the step itself.  So a follower that was killed
at any moment goes on where it was.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from shiradelta.chain.chain import STORE, Chain, Path_
from shiradelta.chain.checks import check_version
from shiradelta.chain.files import write_anchor
from shiradelta.chain.inflight import InFlight
from shiradelta.chain.rows import Anchor, Step
from shiradelta.chain.state import state_digest, state_of
from shiradelta.chain.stores import Store
from shiradelta.errors import ArgumentError, ChainError, TargetError
from shiradelta.folder.apply import apply_step
from shiradelta.folder.commit import make_base
from shiradelta.folder.copying import new_folder
from shiradelta.folder.journal import FOLDER, locked
from shiradelta.folder.listing import recorded
from shiradelta.folder.recovery import recover
from shiradelta.folder.revert import revert
from shiradelta.folder.state import FolderState
from shiradelta.hotswap.session import HotSwap
from shiradelta.io.reader import Delta
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.arguments import CALL, NUMBER, PATH, WHOLE, ArgumentKind, checked
from shiradelta.util.files import os_errors
from shiradelta.util.progress import Progress

#: Called with the step that is about to be applied, or has been.
Hook = Callable[[Step], object]
#: Steps on a folder that can be taken back, beneath which they become part of the base.
KEPT = 8
IN_FLIGHT = ArgumentKind("an InFlight", lambda value: isinstance(value, InFlight))
SESSION = ArgumentKind("a HotSwap", lambda value: isinstance(value, HotSwap))
CHAIN = ArgumentKind("a Chain, a path or an open store", lambda value: isinstance(value, Chain) or STORE.holds(value))


class Follower(ABC):
    """What is taken from version to version.

    Attributes:
        chain: the chain.
    """

    def __init__(self, chain: Chain | Path_ | Store, before: Hook | None, after: Hook | None) -> None:
        self.chain = chain if isinstance(chain, Chain) else Chain.open(chain)
        self._before, self._after = before, after

    @property
    @abstractmethod
    def version(self) -> int | None:
        """The version that it is now; None if it is none yet."""

    @abstractmethod
    def _begin(self, anchor: Anchor) -> None:
        """Becomes an anchor."""

    @abstractmethod
    def _apply(self, step: Step, delta: Delta) -> None:
        """Becomes what a step gives."""

    @abstractmethod
    def _take_back(self, version: int) -> None:
        """Becomes the version before the last step, which is `version` or a later one."""

    @checked(to=WHOLE)
    def follow(self, to: int | None = None) -> list[Step]:
        """Applies the steps from the present version to another; the cheapest way is taken.

        Args:
            to: the version; None for the newest.  To an older one, steps are taken back as far as they are kept.

        Returns:
            The steps that were applied.

        Raises:
            ChainError: no way leads there, a file is missing or is another one, or the weights are of another chain.
            BaseMismatchError: the weights are not those that a step was made for; they stay as they are.
            TargetError: the weights cannot be written.
        """
        done: list[Step] = []
        seen = None
        while True:
            manifest = self.chain.refresh()
            stop = manifest.head if to is None else int(to)
            check_version(stop, manifest, self.chain.store.name)  # before anything is taken back for it
            version = self.version
            while version is not None and version > stop:
                with self._held():
                    self._take_back(stop)
                version = self.version
            try:
                way = self.chain.way(version, stop)
                if way.anchor is not None:
                    self._begin(way.anchor)
                for step in way.steps:
                    self._take(step)
                    done.append(step)
            except ChainError as error:
                # A publisher may have removed the file since the manifest was read; there is another way then.
                if error.reason != "missing_file" or manifest == seen:
                    raise
                seen = manifest
                continue
            return done

    @checked(every=NUMBER, until=CALL)
    def watch(self, every: float = 1.0, until: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Yields each new step when it has been applied; looks for more again and again.

        Args:
            every: seconds to wait where there is no new one.
            until: called before each look; True ends it.

        Raises:
            ArgumentError: the time is less than none.
            As `follow`.
        """
        if not every >= 0:
            raise ArgumentError(f"every is {every}; give seconds, 0 or more")
        while not until():
            done = self.follow()
            yield from done
            if not done:
                time.sleep(every)

    def _label(self, version: int) -> str:
        """What a record calls a version; `version_in` reads it."""
        return f"{self.chain.manifest.id}:{version}"

    def _held(self) -> AbstractContextManager[None]:
        """A context in which nothing uses what is changed."""
        return nullcontext()

    def _take(self, step: Step) -> None:
        with self.chain.open_step(step) as delta, self._held():
            if self._before is not None:
                self._before(step)
            self._apply(step, delta)
            if self._after is not None:
                self._after(step)


class FolderFollower(Follower):
    """Takes a model's folder from version to version, in place.

    A new folder begins with an anchor.  One that is there already has to be a version of the chain bit for bit, which
    reads all of it once; from then on its record says which.  `shiradelta revert` takes the last step back, too.

    Args:
        chain: the chain, its folder, or an open store.
        folder: the model's folder.
        keep: steps that can be taken back; earlier ones become part of the folder's base.
        before: called with a step before it is applied; an error that it raises leaves the folder as it is.
        after: called with a step when it has been applied.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: no step is to be kept.
        ChainError: there is no such chain.
    """

    @checked(chain=CHAIN, folder=PATH, keep=WHOLE, before=CALL, after=CALL)
    def __init__(
        self,
        chain: Chain | Path_ | Store,
        folder: Path_,
        *,
        keep: int = KEPT,
        before: Hook | None = None,
        after: Hook | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(chain, before, after)
        if keep < 1:
            raise ArgumentError(f"keep is {keep}; give 1 or more, as the last step is always kept")
        self.folder = Path(folder)
        self._keep, self._progress = int(keep), progress

    @property
    def version(self) -> int | None:
        """The version that the folder is; None if there is no folder yet.

        Raises:
            ChainError: it is no version of this chain.
            TargetError: its record is damaged, or another process is changing it.
        """
        with os_errors(self.folder, "cannot be read"):
            if self.folder.exists() and not self.folder.is_dir():
                raise TargetError(f"{self.folder}: is a file; give a model's folder, or a new one")
            if not self.folder.exists() or not any(self.folder.iterdir()):
                return None
        state = self._settled()
        if state.current:
            return version_in(state.current, self.chain.manifest.id, str(self.folder))
        if state.applied:
            top, where = state.applied[-1].file, os.fspath(self.folder)
            raise ChainError("not_on_chain", where, f"{top} is on it, which is no step of the chain")
        return self._adopt()

    def _settled(self) -> FolderState:
        """What is recorded, once an action that was interrupted is taken back."""
        if not os.path.lexists(self.folder / FOLDER):
            return FolderState()
        if recorded(self.folder).pending is not None:
            with os_errors(self.folder, "cannot be read"), locked(self.folder) as journal:
                recover(journal)
        return recorded(self.folder)

    def _adopt(self) -> int:
        """Finds by its digest which version a folder is, and records it."""
        found = state_digest(state_of(open_checkpoint(self.folder, packed=True)))
        versions = [version for version, state in self.chain.manifest.states().items() if state == found]
        if not versions:
            raise ChainError("not_on_chain", os.fspath(self.folder), "its digest is that of no version")
        make_base(self.folder, self._label(max(versions)))
        return max(versions)

    def _begin(self, anchor: Anchor) -> None:
        store = self.chain.store
        with new_folder(self.folder, Path(store.name)) as copy:
            write_anchor(store, anchor, copy)
            make_base(copy, self._label(anchor.version))

    def _apply(self, step: Step, delta: Delta) -> None:
        applied = recorded(self.folder).applied
        # A step may set again what an earlier one has set; a delta is on a folder once.
        if len(applied) >= self._keep or any(entry.digest == delta.digest for entry in applied):
            make_base(self.folder)
        apply_step(self.folder, delta, self._label(step.start), self._label(step.stop), self._progress)

    def _take_back(self, version: int) -> None:
        if not recorded(self.folder).applied:
            where = f"{self.folder} to version {version}"
            raise ChainError("not_kept", where, f"its base is version {self.version}")
        revert(self.folder)


class LiveFollower(Follower):
    """Takes the weights of a live model from version to version.

    The last step can be taken back: `swap.revert()` does, too.  When the next one comes, what is on the weights becomes
    the session's base.  Other adapters must not be active meanwhile.

    Args:
        chain: the chain, its folder, or an open store.
        swap: the session on the model.
        version: the version that the model is now; the chain has to have it.
        before: called with a step before it is applied, to stop what uses the weights; an error that it raises leaves
            the weights as they are.
        after: called with a step when it has been applied.
        in_flight: the answers that are made with the weights; a step, and taking one back, waits for these.

    Raises:
        ChainError: there is no such chain, or it has no such version.
    """

    @checked(chain=CHAIN, swap=SESSION, version=WHOLE, before=CALL, after=CALL, in_flight=IN_FLIGHT)
    def __init__(
        self,
        chain: Chain | Path_ | Store,
        swap: HotSwap,
        version: int,
        *,
        before: Hook | None = None,
        after: Hook | None = None,
        in_flight: InFlight | None = None,
    ) -> None:
        super().__init__(chain, before, after)
        if version > self.chain.head:  # it may have been published since the manifest was read
            self.chain.refresh()
        check_version(version, self.chain.manifest, self.chain.store.name)
        self._swap = swap
        self._base = int(version)
        self._last: tuple[str, Step] | None = None
        self._in_flight = in_flight
        if in_flight is not None:
            in_flight.version = self._base

    @property
    def version(self) -> int:
        """The version that the model is.

        Raises:
            ChainError: other adapters are active.
        """
        active = self._swap.active
        if not active:
            return self._base
        if self._last is not None and active == {self._last[0]: 1.0}:
            return self._last[1].stop
        raise ChainError("not_on_chain", "the live model", f"{', '.join(active)} is active on it")

    @contextmanager
    def _held(self) -> Iterator[None]:
        if self._in_flight is None:
            yield
            return
        with self._in_flight.held():
            try:
                yield
            finally:
                self._in_flight.version = self.version

    def _begin(self, anchor: Anchor) -> None:
        raise TargetError("a live model has a version from its beginning")

    def _apply(self, step: Step, delta: Delta) -> None:
        version = self.version
        if self._last is not None:
            name, _ = self._last
            if self._swap.active:
                self._swap.switch(name)  # refused if something else has written the weights
                self._swap.rebase(check=False)
            self._swap.unload(name)
            self._base, self._last = version, None
        name = str(step)
        if len(delta) == 0:  # there is nothing to load
            self._base = step.stop
            return
        self._swap.load(name, str(delta.file))
        self._last = name, step
        self._swap.switch(name)

    def _take_back(self, version: int) -> None:
        if not self._swap.active:
            where = f"the live model to version {version}"
            raise ChainError("not_kept", where, f"its base is version {self._base}")
        self._swap.revert()


@dataclass(frozen=True)
class FolderVersion:
    """Which version of which chain a folder is.

    Attributes:
        chain: the chain's id; empty if the folder is no version of a chain.
        version: the version; None if it is none.
        kept: steps that can be taken back.
        interrupted: whether an action was interrupted, which the next one takes back first.
    """

    chain: str
    version: int | None
    kept: int
    interrupted: bool


@checked(folder=PATH)
def status(folder: Path_) -> FolderVersion:
    """Says which version of a chain a model's folder is, from its record; the weights are not looked at.

    Raises:
        TargetError: there is no such folder, its record is damaged, or another process is changing it.
    """
    state = recorded(folder)
    entries = [entry.label for entry in state.applied]
    id, _, version = (entries[-1] if entries else state.label).partition(":")
    kept = next((number for number, label in enumerate(reversed(entries)) if not label), len(entries))
    return FolderVersion(id, int(version) if version.isdigit() else None, kept, state.pending is not None)


def version_in(label: str, chain: str, where: str) -> int:
    """The version in a folder's label.

    Raises:
        ChainError: it is of another chain.
    """
    id, _, number = label.partition(":")
    if id != chain or not number.isdigit():
        raise ChainError("other_chain", where, f"it is {label[:50]}")
    return int(number)
