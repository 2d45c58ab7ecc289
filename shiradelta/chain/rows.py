"""Rows of a chain's manifest: its anchors, its steps, and pages of earlier steps (spec/CHAIN.md, 2)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shiradelta.chain.fields import digest, fields, number, sequence, text

#: The folders of a store.
KINDS = ("anchors", "pages", "steps")
#: A file of a model, at most two folders deep; nothing hidden.
FILE_NAME = re.compile(r"(?:\w[\w.+-]{0,99}/){0,2}\w[\w.+-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class StoredFile:
    """A file of an anchor.

    Attributes:
        name: its name in the model's folder.
        bytes: its size.
        sha256: its digest.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Anchor:
    """A whole model at one version.

    Attributes:
        version: the version.
        state: the version's digest (`state_digest`).
        files: the model's files.
    """

    version: int
    state: str
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    def path(self, file: StoredFile) -> str:
        """Where a file is in the store."""
        return f"{self.folder}/{file.name}"

    @property
    def folder(self) -> str:
        """Where the files are in the store."""
        files = "".join(f"{file.name}\0{file.sha256}\0" for file in self.files)
        return f"anchors/{self.version:06}-{hashlib.sha256(files.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Step:
    """A `.shd` file that leads from one version to a later one; a fold leads over several.

    Attributes:
        start: the version that it is made for.
        stop: the version that it gives.
        needs: the digest of `start` (`state_digest`).
        gives: the digest of `stop`.
        bytes: the file's size.
        sha256: the file's digest.
        delta: the content digest of the delta.
    """

    start: int
    stop: int
    needs: str
    gives: str
    bytes: int
    sha256: str
    delta: str

    @property
    def is_fold(self) -> bool:
        """Whether it leads over several versions."""
        return self.stop > self.start + 1

    @property
    def path(self) -> str:
        """Where the file is in the store."""
        return f"steps/{self.start:06}-{self.stop:06}-{self.sha256[:16]}.shd"

    def __str__(self) -> str:
        return f"step {self.start} -> {self.stop}"


@dataclass(frozen=True)
class Page:
    """A file of the rows of earlier steps, so that the manifest stays small.

    Attributes:
        first: the least `start` of its steps.
        last: the greatest `start` of its steps.
        bytes: the file's size.
        sha256: the file's digest.
    """

    first: int
    last: int
    bytes: int
    sha256: str

    @property
    def path(self) -> str:
        """Where the file is in the store."""
        return f"pages/{self.first:06}-{self.last:06}-{self.sha256[:16]}.json"


def parse_anchor(found: Any) -> Anchor:
    """An anchor's row; ValueError for anything else."""
    version, state, files = fields(found, {"version": number, "state": digest, "files": sequence})
    parsed = tuple(map(_parse_file, files))
    names = [file.name for file in parsed]
    if sorted(set(names)) != names:
        raise ValueError("files of an anchor out of order")
    return Anchor(version, state, parsed)


def _parse_file(found: Any) -> StoredFile:
    return StoredFile(*fields(found, {"name": text(FILE_NAME), "bytes": number, "sha256": digest}))


_STEP = {
    **dict.fromkeys(("start", "stop"), number),
    **dict.fromkeys(("needs", "gives"), digest),
    "bytes": number,
    **dict.fromkeys(("sha256", "delta"), digest),
}


def parse_step(found: Any) -> Step:
    """A step's row; ValueError for anything else."""
    return Step(*fields(found, _STEP))


def parse_page(found: Any) -> Page:
    """A page's row; ValueError for anything else."""
    return Page(*fields(found, {**dict.fromkeys(("first", "last", "bytes"), number), "sha256": digest}))


def inserted(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """Steps with another one, in order."""
    return tuple(sorted((*steps, step), key=lambda each: (each.start, each.stop)))


def in_order(steps: tuple[Step, ...]) -> bool:
    """Whether steps are sorted by `start`, then `stop`, and no two have the same."""
    keys = [(step.start, step.stop) for step in steps]
    return all(one < other for one, other in pairwise(keys))
