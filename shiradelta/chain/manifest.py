"""The manifest of a chain, `chain.json`: versions, steps between them, and anchors (spec/CHAIN.md, 2).

It may come from anywhere, so all of it is checked when it is read, and no path in it is used: the paths of files are
made of numbers and digests.  Earlier steps may be in pages, which are read when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from shiradelta.chain.fields import fields, mapping, number, parsed, sequence, text
from shiradelta.chain.pages import Pages, page_key
from shiradelta.chain.rows import Anchor, Page, Step, in_order, parse_anchor, parse_page, parse_step
from shiradelta.chain.state import State, TensorState, state_digest
from shiradelta.errors import ChainError, FormatError
from shiradelta.format import registry
from shiradelta.format.container import check_name
from shiradelta.format.delta import check_shape

MANIFEST = "chain.json"
#: The most bytes of a manifest that are read.
LARGEST_MANIFEST = 64 << 20
#: Formats: without pages, and with them.
_WHOLE, _PAGED = 1, 2
_ID = re.compile(r"[0-9a-f]{32}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Manifest:
    """What a chain holds.

    Attributes:
        id: names the chain, so that followers of another one notice.
        head: the newest version.
        tensors: the state of the newest version.
        anchors: by version.
        newest: the steps that are in no page, by `start`, then `stop`.
        pages: by `first`, then `last`, then digest.
        library: reads pages.
    """

    id: str
    head: int
    tensors: State
    anchors: tuple[Anchor, ...]
    newest: tuple[Step, ...]
    pages: tuple[Page, ...] = ()
    library: Pages | None = field(default=None, compare=False, repr=False)

    @cached_property
    def state(self) -> str:
        """The digest of the newest version."""
        return state_digest(self.tensors)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All steps, by `start`, then `stop`; reads every page, and checks that all of them agree.

        Raises:
            ChainError: a page is missing or damaged, or they do not agree.
        """
        if not self.pages:
            return self.newest
        steps = self._with(self.pages)
        try:
            self._check(steps, whole=True)
        except ValueError as error:
            name = self.library.name if self.library else MANIFEST
            raise ChainError("bad_manifest", f"{name}: the pages", str(error)[:200]) from None
        return steps

    def since(self, version: int) -> tuple[Step, ...]:
        """The steps that begin with a version or a later one, in order; reads the pages that have such.

        Raises:
            ChainError: a page is missing or damaged.
        """
        steps = self._with([page for page in self.pages if page.last >= version])
        return steps[bisect_left(steps, version, key=lambda step: step.start) :]

    def _with(self, pages: Sequence[Page]) -> tuple[Step, ...]:
        """The newest steps and those of pages, in order."""
        if not pages:
            return self.newest
        if self.library is None:
            raise ValueError("pages without a store to read them from")
        steps = [*self.library.steps(pages), *self.newest]
        return tuple(sorted(steps, key=lambda step: (step.start, step.stop)))

    def states(self) -> dict[int, str]:
        """Version -> its digest, for every version that a step or an anchor names; reads every page."""
        return {version: state for version, state, _ in self._claims(self.steps)} | {self.head: self.state}

    def files(self) -> dict[str, tuple[int, str]]:
        """Path -> (size, SHA-256), of every file in the store; reads every page."""
        listed: tuple[Step | Page, ...] = (*self.steps, *self.pages)
        found = {each.path: (each.bytes, each.sha256) for each in listed}
        for anchor in self.anchors:
            found |= {anchor.path(file): (file.bytes, file.sha256) for file in anchor.files}
        return found

    def _claims(self, steps: Iterable[Step]) -> Iterator[tuple[int, str, str]]:
        """(version, its digest, who says so)."""
        for anchor in self.anchors:
            yield anchor.version, anchor.state, f"anchor {anchor.version}"
        for step in steps:
            yield step.start, step.needs, str(step)
            yield step.stop, step.gives, str(step)

    def to_json(self) -> bytes:
        """The bytes of chain.json."""
        content = {
            "format": _PAGED if self.pages else _WHOLE,
            "id": self.id,
            "head": self.head,
            "tensors": {
                name: {"dtype": one.dtype, "shape": list(one.shape), "fingerprint": f"{one.fingerprint:016x}"}
                for name, one in self.tensors.items()
            },
            "anchors": [asdict(anchor) for anchor in self.anchors],
            "steps": [vars(step) for step in self.newest],
            **({"pages": [vars(page) for page in self.pages]} if self.pages else {}),
        }
        return json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ":")).encode()

    def check(self) -> None:
        """Checks that what chain.json says agrees.

        Raises:
            ValueError: it does not.
        """
        keys = [page_key(page) for page in self.pages]
        if sorted(set(keys)) != keys or any(page.first > page.last or page.last > self.head for page in self.pages):
            raise ValueError("pages out of order")
        self._check(self.newest, whole=not self.pages)

    def _check(self, steps: tuple[Step, ...], whole: bool) -> None:
        versions = [anchor.version for anchor in self.anchors]
        if sorted(set(versions)) != versions:
            raise ValueError("anchors out of order")
        if not in_order(steps):
            raise ValueError("steps out of order")
        known = {self.head: (self.state, "the tensors of the head")}
        for version, state, who in self._claims(steps):
            first, by = known.setdefault(version, (state, who))
            if first != state:
                raise ValueError(f"{by} and {who} disagree on version {version}")
        if max(known) > self.head:
            raise ValueError(f"version {max(known)} is newer than the head, {self.head}")
        if any(step.start >= step.stop for step in steps):
            raise ValueError("a step that leads nowhere")
        if whole and not reachable(steps, versions, self.head):
            raise ValueError(f"no anchor leads to the head, {self.head}")


def reachable(steps: Sequence[Step], starts: Sequence[int], stop: int) -> bool:
    """Whether steps, by `start`, lead from one of some versions to another."""
    found = set(starts)
    for step in steps:
        if step.start in found:
            found.add(step.stop)
    return stop in found


def parse_manifest(raw: bytes, where: str, library: Pages | None = None) -> Manifest:
    """Parses chain.json and checks all of it.

    Args:
        raw: its bytes.
        where: what to call it in messages.
        library: reads its pages.

    Raises:
        ChainError: it is damaged, or of a later format.
    """
    try:
        found = parsed(raw)
        if not isinstance(found, dict) or type(found.get("format")) is not int:
            raise ValueError("it has no format")
        if found["format"] not in (_WHOLE, _PAGED):
            raise ChainError("unknown_version", where, f"format {str(found['format'])[:20]}")
        checksum = found.pop("checksum", None)
        if checksum != _checksum(found):
            raise ValueError("its checksum is wrong")
        kinds: dict[str, Callable[[Any], Any]] = {"format": number, "id": text(_ID), "head": number}
        kinds |= {"tensors": mapping, "anchors": sequence, "steps": sequence}
        kinds |= {"pages": sequence} if found["format"] == _PAGED else {}
        _, id, head, tensors, anchors, steps, *pages = fields(found, kinds)
        manifest = Manifest(
            id,
            head,
            {name: _tensor(name, one) for name, one in tensors.items()},
            tuple(map(parse_anchor, anchors)),
            tuple(map(parse_step, steps)),
            tuple(map(parse_page, pages[0])) if pages else (),
            library,
        )
        if pages and not manifest.pages:
            raise ValueError("it is of the format with pages, and has none")
        manifest.check()
    except (ValueError, RecursionError) as error:
        raise ChainError("bad_manifest", where, str(error)[:200] or type(error).__name__) from None
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(map(number, sequence(value)))
    check_shape(shape)  # a DeltaError is a ValueError
    return shape


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in registry.DTYPE_OF_NAME or value == registry.UNSPECIFIED.name:
        raise ValueError(f"{str(value)[:40]!r} is no dtype of the format")
    return value


def _tensor(name: str, found: Any) -> TensorState:
    check_tensor_name(name)
    dtype, shape, fingerprint = fields(found, {"dtype": _dtype, "shape": _shape, "fingerprint": text(_FINGERPRINT)})
    return TensorState(dtype, shape, int(fingerprint, 16))


def check_tensor_name(name: str) -> None:
    """Checks that a `.shd` file can hold a tensor's name.

    Raises:
        ValueError: it cannot.
    """
    try:
        check_name(name.encode())
    except (FormatError, UnicodeEncodeError):
        raise ValueError(f"{name[:40]!r} is no name of a tensor") from None
