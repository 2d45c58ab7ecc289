"""`Chain`: publishes steps and anchors in a store, folds steps, collects garbage, verifies (spec/CHAIN.md).

What is published never changes: the path of a file has its digest in it.  A file is in place before the manifest that
names it, and the manifest goes before the files that it does not name any more.
"""

from __future__ import annotations

import copy
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shiradelta.chain.checks import (
    check_contents,
    check_digest,
    check_digest_new,
    check_new,
    check_state,
    check_sum,
    check_version,
)
from shiradelta.chain.conditions import read_if_there
from shiradelta.chain.difference import plain_step, smaller_form, write_difference
from shiradelta.chain.digests import digest_of_file
from shiradelta.chain.files import check_outside, put, put_anchor, write_anchor
from shiradelta.chain.fold import fold, needs_base
from shiradelta.chain.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, parse_manifest
from shiradelta.chain.pages import Pages
from shiradelta.chain.rows import Anchor, Step, inserted
from shiradelta.chain.state import State, advanced, state_digest, state_of
from shiradelta.chain.stores import Store, open_store
from shiradelta.chain.versions import Versions
from shiradelta.chain.way import Way, cheapest
from shiradelta.errors import ArgumentError, ChainError, ShiraDeltaError, TargetError
from shiradelta.io.context import CONTEXTS
from shiradelta.io.download import local_model
from shiradelta.io.reader import Delta, open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.arguments import PATH, WHOLE, ArgumentKind, checked, is_path
from shiradelta.util.open_files import open_files
from shiradelta.util.progress import Progress

Path_ = str | os.PathLike[str]
STORE = ArgumentKind("the path of a chain, or an open store", lambda value: is_path(value) or hasattr(value, "locked"))
START = ArgumentKind("a version, or None for an anchor", lambda value: value is None or WHOLE.holds(value))
STEP = ArgumentKind("a step of the chain's manifest", lambda value: isinstance(value, Step))


@dataclass(frozen=True)
class GarbageReport:
    """Report of `Chain.collect`.

    Attributes:
        forgotten: the steps and the versions of anchors that the manifest does not name any more.
        files: number of files that were removed.
    """

    forgotten: tuple[str, ...]
    files: int


class Chain:
    """A chain of versions of a model, 0, 1, 2, ..., with the steps between them, in a store.

    Attributes:
        store: where its files are.
        manifest: what it held when it was read last; `refresh` reads it again.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._pages = manifest.library or Pages(store)
        self._raw: bytes | None = None

    @classmethod
    @checked(store=STORE)
    def create(cls, store: Path_ | Store, model_dir: Path_) -> Chain:
        """Begins a chain: version 0 is a model, with an anchor.

        Args:
            store: a folder, which may be new, or an open store.
            model_dir: the model's folder, or `user/repo[@revision][/folder]` on the Hub.

        Raises:
            ChainError: a chain is there already.
            SourceError: there is no such model.
            TargetError: the store cannot be written or lies in the model's folder, or an anchor cannot hold a file of
                the model.
        """
        opened, checkpoint = open_store(store), open_checkpoint(local_model(model_dir), packed=True)
        check_outside(opened, checkpoint.root)
        with opened.locked():
            if _read(opened) is not None:
                raise ChainError("exists", opened.name)
            anchor, state = put_anchor(opened, 0, checkpoint)
            chain = cls(opened, Manifest(secrets.token_hex(16), 0, state, (anchor,), ()))
            chain._save(chain.manifest)
            return chain

    @classmethod
    @checked(store=STORE)
    def open(cls, store: Path_ | Store) -> Chain:
        """Opens a chain.

        Args:
            store: its folder, or an open store.

        Raises:
            ChainError: there is none, or its manifest is refused.
        """
        opened = open_store(store)
        raw = _needed(opened)
        chain = cls(opened, _parsed(opened, raw, Pages(opened)))
        chain._raw = raw
        return chain

    @property
    def head(self) -> int:
        """The newest version."""
        return self.manifest.head

    def refresh(self) -> Manifest:
        """Reads the manifest again and returns it.

        Raises:
            ChainError: it is gone, is refused, or is that of another chain.
        """
        raw = _needed(self.store)
        if raw == self._raw:
            return self.manifest
        found = _parsed(self.store, raw, self._pages)
        if found.id != self.manifest.id:
            raise ChainError("other_chain", self.store.name)
        self.manifest, self._raw = found, raw
        return found

    # ------------------------------------------------------------------------------------- publishing

    @checked(delta=PATH, version=WHOLE)
    def publish(
        self,
        delta: Path_,
        *,
        version: int | None = None,
        base: Path_ | None = None,
        context: str = "base",
        progress: Progress | None = None,
    ) -> Step:
        """Publishes the step from the newest version to the next.

        Args:
            delta: the `.shd` file, with fingerprints; or, with `base`, the folder of the model after the step.
            version: the version that it gives, which has to be the next; None for the next, whatever it is.
            base: the model before it, to check that it is the newest version and that the step fits it; reads all of
                it.  For a folder it is needed.
            context: with `base`, "base" publishes the form that is read with the version before only, if that is
                smaller; "none" keeps the form of the file, and makes a plain one of a folder.
            progress: called with (tensor, done, total).

        Raises:
            ChainError: a version before it is missing, it is published already, or it was made for something else.
            ArgumentError: there is no such context, or no step can give that version.
            FormatError: the file is damaged.
            TargetError: the store cannot be written.
        """
        if context not in CONTEXTS:
            raise ArgumentError(f"context is {context!r}, which is none of {', '.join(CONTEXTS)}")
        if version is not None and version < 1:
            raise ArgumentError(f"version is {version}; give 1 or more, as a chain begins with version 0")
        with self._changing() as manifest, ExitStack() as stack:
            if version is not None and version > manifest.head + 1:
                raise ChainError("gap", os.fspath(delta), f"version {version} after {manifest.head}")
            before = None if base is None else open_checkpoint(local_model(base), packed=True)
            path, work = Path(delta), Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if version is not None and version <= manifest.head:
                check_new(path, manifest, version)
            if before is not None:
                try:
                    check_state(before, manifest.state, f"version {manifest.head}")
                except ChainError:
                    check_new(path, manifest, version)  # a step that comes twice was made for an earlier version
                    raise
            if path.is_dir():
                if before is None:
                    raise ChainError("no_fingerprint", str(path), "a folder is compared with the model before it")
                path = work / "step.shd"
                with writing(path) as writer:
                    write_difference(writer, before, open_checkpoint(Path(delta), packed=True), progress)
            opened = stack.enter_context(open_delta(path))
            size, sha256 = digest_of_file(path)
            check_digest_new(opened, str(delta), manifest, version)
            step = Step(manifest.head, manifest.head + 1, manifest.state, "", size, sha256, opened.digest)
            readable = opened
            if opened.needs_base:
                readable = stack.enter_context(plain_step(opened, before))
            check_contents(readable, before)
            if before is not None and context == "base" and not opened.needs_base:
                path = smaller_form(path, opened, before, work)
                size, sha256 = digest_of_file(path)
                step = replace(step, bytes=size, sha256=sha256)
            tensors = advanced(manifest.tensors, readable.items(), str(delta))
            step = replace(step, gives=state_digest(tensors))
            put(self.store, step.path, path, step.bytes, step.sha256)
            self._save(replace(manifest, head=step.stop, tensors=tensors, newest=inserted(manifest.newest, step)))
            return step

    @checked(version=WHOLE)
    def publish_anchor(self, model_dir: Path_, version: int | None = None) -> Anchor:
        """Publishes the whole model at a version, from which late followers may begin.

        Args:
            model_dir: the model, which has to be that version bit for bit; all of it is read.
            version: the version; None for the newest.

        Raises:
            ChainError: the model is another version, or the chain has no such version, or an anchor for it.
            TargetError: the store cannot be written, or an anchor cannot hold a file of the model.
        """
        with self._changing() as manifest:
            number = manifest.head if version is None else int(version)
            check_version(number, manifest, self.store.name)
            wanted = manifest.states().get(number)
            if wanted is None:
                raise ChainError("not_published", self.store.name, f"version {number}, which is named nowhere any more")
            if any(anchor.version == number for anchor in manifest.anchors):
                raise ChainError("duplicate", self.store.name, f"an anchor for version {number} is there")
            checkpoint = open_checkpoint(local_model(model_dir), packed=True)
            check_state(checkpoint, wanted, f"version {number}")
            anchor, state = put_anchor(self.store, number, checkpoint)
            if state_digest(state) != wanted:
                raise TargetError(f"{model_dir}: was changed meanwhile; try again when nothing else writes it")
            anchors = sorted((*manifest.anchors, anchor), key=lambda each: each.version)
            self._save(replace(manifest, anchors=tuple(anchors)))
            return anchor

    # ---------------------------------------------------------------------------------------- folding

    @checked(start=WHOLE, stop=WHOLE)
    def fold(self, start: int, stop: int, *, base: Path_ | None = None, progress: Progress | None = None) -> Step:
        """Publishes one step for the way from one version to another; it gives the same bits.

        Args:
            start: the version that it is for.
            stop: the version that it gives.
            base: the model at `start`, which steps need that add to elements or shift them; without it, it is built in
                a temporary folder, from an anchor.
            progress: called with (tensor, done, total).

        Raises:
            ArgumentError: `stop` is not after `start`.
            ChainError: no steps lead there, they cannot be folded exactly, or the fold is there already.
            FormatError: a step is damaged.
            TargetError: the store cannot be written.
        """
        if start >= stop:
            raise ArgumentError(f"a fold of {start} -> {stop} does not lead forward; give a stop after its start")
        with self._changing() as manifest, ExitStack() as stack:
            if any((step.start, step.stop) == (start, stop) for step in manifest.since(start)):
                raise ChainError("duplicate", self.store.name, f"a step {start} -> {stop} is there")
            steps = self.way(start, stop).steps
            stack.enter_context(open_files(len(steps)))
            opened = [stack.enter_context(self.open_step(step)) for step in steps]
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path, checkpoint = work / "fold.shd", None
            if base is not None:
                checkpoint = open_checkpoint(local_model(base), packed=True)
            elif needs_base(opened) and cheapest(manifest, None, start) is not None:
                checkpoint = self._versions(work).at(start)
            with writing(path, "f32") as writer:
                fold(opened, writer, checkpoint, progress)
            folded = stack.enter_context(open_delta(path))
            check_sum(opened, folded)
            if checkpoint is not None and any(step.needs_base or step.packed for step in opened):
                path = smaller_form(path, folded, checkpoint, work)
            size, sha256 = digest_of_file(path)
            step = Step(start, stop, steps[0].needs, steps[-1].gives, size, sha256, folded.digest)
            put(self.store, step.path, path, size, sha256)
            self._save(replace(manifest, newest=inserted(manifest.newest, step)))
            return step

    def _versions(self, folder: Path) -> Versions:
        """The chain's versions, to be built in a folder."""
        return Versions(self.store, self.way, self.open_step, folder)

    # ------------------------------------------------------------------------------------- following

    @checked(start=START, stop=WHOLE)
    def way(self, start: int | None, stop: int) -> Way:
        """The way to a version that takes the fewest bytes.

        Args:
            start: the version to begin with; None to begin with an anchor.
            stop: the version to reach.

        Raises:
            ArgumentError: `stop` is before `start`.
            ChainError: the chain has no such version, or no steps that are left lead there.
        """
        manifest = self.manifest
        for version in (start, stop):
            if version is not None:
                check_version(version, manifest, self.store.name)
        if start is not None and start > stop:
            raise ArgumentError(f"{start} -> {stop} goes back, and steps lead forward; a follower takes steps back")
        found = cheapest(manifest, start, stop)
        if found is None:
            begin = "an anchor" if start is None else f"version {start}"
            gone = "" if stop in manifest.states() else ", which is named nowhere any more"
            raise ChainError("pruned", self.store.name, f"from {begin} to version {stop}{gone}")
        return found

    @checked(step=STEP)
    def open_step(self, step: Step) -> Delta:
        """Opens the file of a step, once its digest is checked.

        Raises:
            ChainError: it is missing, or is not the file that was published.
            FormatError: it is damaged.
        """
        delta = open_delta(self.store.fetched(step.path, step.bytes, step.sha256))
        if delta.digest != step.delta:
            delta.close()
            raise ChainError("wrong_bytes", f"{self.store.name}/{step.path}", f"it holds delta {delta.digest[:16]}...")
        return delta

    # --------------------------------------------------------------------------------- garbage, proof

    @checked(before=WHOLE)
    def collect(self, before: int | None = None) -> GarbageReport:
        """Removes files that nothing names, and with `before` all that only older versions need.

        Every version from `before` on can still be reached: from it, and from an anchor.

        Args:
            before: the oldest version that is kept; None keeps every step and anchor.

        Raises:
            ChainError: the chain has no such version, or it could not be reached any more.
            TargetError: the store cannot be written.
        """
        with self._changing() as manifest:
            kept = manifest
            if before is not None:
                way = self.way(None, int(before))
                on_way = set(way.steps)
                steps = tuple(step for step in manifest.steps if step.start >= before or step in on_way)
                anchors = tuple(each for each in manifest.anchors if each.version >= before or each == way.anchor)
                kept = replace(manifest, newest=steps, pages=(), anchors=anchors)
                try:
                    kept.check()
                except ValueError as error:
                    raise ChainError("unreachable", self.store.name, str(error)) from None
                if (kept.steps, kept.anchors) != (manifest.steps, manifest.anchors):
                    self._save(kept)
            named = self.manifest.files()
            others = [path for path in self.store.files() if path not in named]
            for path in others:
                self.store.remove(path)
            remaining = set(kept.steps)
            gone = [str(step) for step in manifest.steps if step not in remaining]
            gone += [f"anchor {each.version}" for each in manifest.anchors if each not in kept.anchors]
            return GarbageReport(tuple(gone), len(others))

    def verify(self) -> list[str]:
        """Reads every file, and computes every version's digest anew; returns what is wrong, a line each.

        Raises:
            ChainError: the manifest is refused.
        """
        self.refresh()
        read_anew = copy.copy(self)
        read_anew.store = self.store.fresh()
        with tempfile.TemporaryDirectory() as folder:
            return read_anew._problems(read_anew._versions(Path(folder)))

    def _problems(self, versions: Versions) -> list[str]:
        """What `verify` finds, given a place for versions that steps are read with."""
        problems: list[str] = []
        states: dict[int, State] = {}
        manifest = self.manifest
        for anchor in manifest.anchors:
            with _collected(problems), tempfile.TemporaryDirectory() as folder:
                write_anchor(self.store, anchor, Path(folder))
                states[anchor.version] = state_of(open_checkpoint(folder, packed=True))
        for step in manifest.steps:
            with _collected(problems), ExitStack() as steps:
                delta = steps.enter_context(self.open_step(step))
                before = versions.at(step.start) if delta.needs_base else None
                if before is not None:
                    delta = steps.enter_context(plain_step(delta, before))
                check_contents(delta, before)
                if step.start in states:
                    after = advanced(states[step.start], delta.items(), f"{self.store.name}: {step}")
                    check_digest(after, step.gives, f"{self.store.name}: {step}")
                    states.setdefault(step.stop, after)
        return problems

    # ------------------------------------------------------------------------------------------- inside

    @contextmanager
    def _changing(self) -> Iterator[Manifest]:
        """Keeps other publishers out, and reads the manifest."""
        with self.store.locked():
            yield self.refresh()

    def _save(self, manifest: Manifest) -> None:
        pages, newest = self._pages.filled(manifest.pages, manifest.newest)
        manifest = replace(manifest, newest=newest, pages=pages, library=self._pages)
        manifest.check()
        raw = manifest.to_json()
        self.store.swap(MANIFEST, raw, self._raw)
        self.manifest, self._raw = manifest, raw


def _read(store: Store) -> bytes | None:
    """The bytes of the manifest; None if there is none."""
    raw = read_if_there(store, MANIFEST, LARGEST_MANIFEST)
    if raw is not None and len(raw) > LARGEST_MANIFEST:
        raise ChainError("bad_manifest", f"{store.name}/{MANIFEST}", f"it has more than {LARGEST_MANIFEST >> 20} MiB")
    return raw


def _needed(store: Store) -> bytes:
    raw = _read(store)
    if raw is None:
        raise ChainError("no_chain", store.name)
    return raw


def _parsed(store: Store, raw: bytes, pages: Pages) -> Manifest:
    return parse_manifest(raw, f"{store.name}/{MANIFEST}", pages)


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Adds an error of the block to a list."""
    try:
        yield
    except ShiraDeltaError as error:
        problems.append(str(error))
