"""The manifest of a chain, `chain.json`: versions, steps between them, and anchors (spec/CHAIN.md, 2).

It may come from anywhere, so all of it is checked when it is read, and no path in it is used: the paths of files are
made of numbers and digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shiradelta.chain.state import State, TensorState, state_digest
from shiradelta.errors import ChainError, FormatError
from shiradelta.format import registry
from shiradelta.format.container import check_name
from shiradelta.format.delta import check_shape

MANIFEST = "chain.json"
#: The most bytes of a manifest that are read.
LARGEST_MANIFEST = 64 << 20
_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
#: A file of a model, at most two folders deep; nothing hidden.
FILE_NAME = re.compile(r"(?:\w[\w.+-]{0,99}/){0,2}\w[\w.+-]{0,199}", re.ASCII)
#: The largest version and file size: JSON's numbers are exact up to there everywhere.
_LARGEST = (1 << 53) - 1


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
class Manifest:
    """What a chain holds.

    Attributes:
        id: names the chain, so that followers of another one notice.
        head: the newest version.
        tensors: the state of the newest version.
        anchors: by version.
        steps: by `start`, then `stop`.
    """

    id: str
    head: int
    tensors: State
    anchors: tuple[Anchor, ...]
    steps: tuple[Step, ...]

    @property
    def state(self) -> str:
        """The digest of the newest version."""
        return state_digest(self.tensors)

    def states(self) -> dict[int, str]:
        """Version -> its digest, for every version that a step or an anchor names."""
        return {version: state for version, state, _ in self._claims()} | {self.head: self.state}

    def files(self) -> dict[str, tuple[int, str]]:
        """Path -> (size, SHA-256), of every file in the store."""
        found = {step.path: (step.bytes, step.sha256) for step in self.steps}
        for anchor in self.anchors:
            found |= {anchor.path(file): (file.bytes, file.sha256) for file in anchor.files}
        return found

    def _claims(self) -> Iterator[tuple[int, str, str]]:
        """(version, its digest, who says so)."""
        for anchor in self.anchors:
            yield anchor.version, anchor.state, f"anchor {anchor.version}"
        for step in self.steps:
            yield step.start, step.needs, str(step)
            yield step.stop, step.gives, str(step)

    def to_json(self) -> bytes:
        """The bytes of chain.json."""
        content = {
            "format": _FORMAT,
            "id": self.id,
            "head": self.head,
            "tensors": {
                name: {"dtype": one.dtype, "shape": list(one.shape), "fingerprint": f"{one.fingerprint:016x}"}
                for name, one in self.tensors.items()
            },
            "anchors": [asdict(anchor) for anchor in self.anchors],
            "steps": [asdict(step) for step in self.steps],
        }
        return json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ":")).encode()

    def check(self) -> None:
        """Checks that all of it agrees.

        Raises:
            ValueError: it does not.
        """
        for what, keys in (
            ("anchors", [(anchor.version, 0) for anchor in self.anchors]),
            ("steps", [(step.start, step.stop) for step in self.steps]),
        ):
            if sorted(set(keys)) != keys:
                raise ValueError(f"{what} out of order")
        known = {self.head: (self.state, "the tensors of the head")}
        for version, state, who in self._claims():
            first, by = known.setdefault(version, (state, who))
            if first != state:
                raise ValueError(f"{by} and {who} disagree on version {version}")
        if max(known) > self.head:
            raise ValueError(f"version {max(known)} is newer than the head, {self.head}")
        if any(step.start >= step.stop for step in self.steps):
            raise ValueError("a step that leads nowhere")
        if not reachable(self.steps, [anchor.version for anchor in self.anchors], self.head):
            raise ValueError(f"no anchor leads to the head, {self.head}")


def reachable(steps: Sequence[Step], starts: Sequence[int], stop: int) -> bool:
    """Whether steps lead from one of some versions to another."""
    found = set(starts)
    for step in sorted(steps, key=lambda step: step.start):
        if step.start in found:
            found.add(step.stop)
    return stop in found


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Parses chain.json and checks all of it.

    Args:
        raw: its bytes.
        where: what to call it in messages.

    Raises:
        ChainError: it is damaged, or of a later format.
    """
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        if not isinstance(found, dict) or type(found.get("format")) is not int:
            raise ValueError("it has no format")
        if found["format"] != _FORMAT:
            raise ChainError("unknown_version", where, f"format {str(found['format'])[:20]}")
        checksum = found.pop("checksum", None)
        if checksum != _checksum(found):
            raise ValueError("its checksum is wrong")
        _, id, head, tensors, anchors, steps = _fields(
            found,
            {"format": _number, "id": _text(_ID), "head": _number, "tensors": _dict, "anchors": _list, "steps": _list},
        )
        manifest = Manifest(
            id,
            head,
            {name: _tensor(name, one) for name, one in tensors.items()},
            tuple(map(_anchor, anchors)),
            tuple(map(_step, steps)),
        )
        manifest.check()
    except (ValueError, RecursionError) as error:
        raise ChainError("bad_manifest", where, str(error)[:200] or type(error).__name__) from None
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _fields(found: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> list[Any]:
    """The values of an object that has exactly these keys, checked."""
    if not isinstance(found, dict) or set(found) != set(kinds):
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{keys} in place of {sorted(kinds)}")
    values = []
    for key, kind in kinds.items():
        try:
            values.append(kind(found[key]))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return values


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is no whole number from 0 to 2^53 - 1")
    return value


def _text(form: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not form.fullmatch(value):
            raise ValueError(f"{str(value)[:40]!r} has another form")
        return value

    return check


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("is no object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("is no list")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(map(_number, _list(value)))
    check_shape(shape)  # a DeltaError is a ValueError
    return shape


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in registry.DTYPE_OF_NAME or value == registry.UNSPECIFIED.name:
        raise ValueError(f"{str(value)[:40]!r} is no dtype of the format")
    return value


def _tensor(name: str, found: Any) -> TensorState:
    check_tensor_name(name)
    dtype, shape, fingerprint = _fields(found, {"dtype": _dtype, "shape": _shape, "fingerprint": _text(_FINGERPRINT)})
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


def _file(found: Any) -> StoredFile:
    return StoredFile(*_fields(found, {"name": _text(FILE_NAME), "bytes": _number, "sha256": _text(_DIGEST)}))


def _anchor(found: Any) -> Anchor:
    version, state, files = _fields(found, {"version": _number, "state": _text(_DIGEST), "files": _list})
    parsed = tuple(map(_file, files))
    names = [file.name for file in parsed]
    if sorted(set(names)) != names:
        raise ValueError("files of an anchor out of order")
    return Anchor(version, state, parsed)


def _step(found: Any) -> Step:
    kinds: dict[str, Callable[[Any], Any]] = dict.fromkeys(("start", "stop"), _number)
    kinds |= dict.fromkeys(("needs", "gives"), _text(_DIGEST)) | {"bytes": _number}
    return Step(*_fields(found, kinds | dict.fromkeys(("sha256", "delta"), _text(_DIGEST))))
