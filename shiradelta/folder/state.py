"""What `state.json` says: the deltas on a folder, the unfinished action, and digests of the weight files.

The file is never trusted, since a folder may come from anywhere.  What it names is checked here by its form, and by
those who use it against the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shiradelta.errors import TargetError

#: A weight file or its index, in the model's folder or in a component's.
_WEIGHT_FILE = re.compile(r"(?:[^./\\\0][^/\\\0]*/)?[^./\\\0][^/\\\0]*\.safetensors(?:\.index(?:\.[\w-]+)?\.json)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: The largest finite float32; NaN is not below it, and an integer may be larger than any float.
_LARGEST_STRENGTH = 2.0**128 - 2.0**104
_VERSION = 3
#: Version -> the fields of an action that files of earlier versions lack.
_SINCE: dict[int, dict[str, Any]] = {2: {"before": {}, "after": {}, "undo": ""}, 3: {"label": ""}}
#: What weights may be called.
_LABEL = re.compile(r"[\w:.-]{0,100}", re.ASCII)


@dataclass(frozen=True)
class Applied:
    """A delta that is applied to a folder.

    Attributes:
        id: number of the action, which names its undo delta.
        file: name of the delta's file.
        digest: the delta's content digest.
        strength: alpha.
        tensors: number of tensors in the delta.
        nonzeros: number of nonzeros in the delta.
        replaced: files that were rewritten because tensors were added or removed; the originals are in `undo/<id>/`.
        added: names of added tensors -> their fingerprints.
        before: files that the action changes -> their SHA-256 before it; empty if an older version applied it.
        after: files that were rewritten -> the SHA-256 of the new ones.
        undo: SHA-256 of the file of the undo delta.
        successor: whether the delta was made for what was on the folder then, not for the folder's base.
        label: what the weights are called after it, such as a version of a chain; empty if nothing.
    """

    id: int
    file: str
    digest: str
    strength: float
    tensors: int
    nonzeros: int
    replaced: tuple[str, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    undo: str = ""
    successor: bool = False
    label: str = ""


@dataclass(frozen=True)
class FolderState:
    """What is recorded of a folder.

    Attributes:
        applied: the deltas on it, the last one on top.
        pending: the unfinished action, if any: an apply or a revert.  Either is taken back by its undo delta.
        base: weight files and their indexes -> their SHA-256 in the base; empty if it is not known.
        label: what the base is called; empty if nothing.
    """

    applied: tuple[Applied, ...] = ()
    pending: Applied | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def current(self) -> str:
        """What the present weights are called; empty if nothing, or if an action was interrupted."""
        if self.pending is not None:
            return ""
        return self.applied[-1].label if self.applied else self.label

    def to_json(self) -> bytes:
        """The bytes of state.json, with a checksum over the rest."""
        content = {"version": _VERSION, **asdict(self)}
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()


def parse_state(raw: bytes) -> FolderState:
    """Parses state.json, of this version or an older one.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is malformed or damaged.
    """
    found = json.loads(raw)
    version = found.pop("version")
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise ValueError(f"version {str(version)[:20]!r}")
    if version > 1 and found.pop("checksum") != _checksum({"version": version, **found}):
        raise ValueError("its checksum is wrong")
    base = _digests(found["base"]) if version > 1 else {}
    label = _label(found["label"]) if version > 2 else ""
    old = {key: value for since, fields in _SINCE.items() if version < since for key, value in fields.items()}
    applied = tuple(_applied({**old, **entry}) for entry in found["applied"])
    pending = None if found["pending"] is None else _applied({**old, **found["pending"]})
    ids = [entry.id for entry in (*applied, *([pending] if pending else []))]
    if sorted(set(ids)) != ids:
        raise ValueError("actions out of order")
    _check_first(base, (*applied, *([pending] if pending else [])))
    return FolderState(applied, pending, base, label)


def check_names(root: Path, files: Iterable[str]) -> None:
    """Checks that weight files have names that can be recorded.

    Raises:
        TargetError: one has not.
    """
    for name in files:
        if not _WEIGHT_FILE.fullmatch(name):
            raise TargetError(f"{root / name}: cannot be patched in place under this name; give --out FOLDER")


def _check_first(base: Mapping[str, str], actions: Iterable[Applied]) -> None:
    """Checks that the first action on each file found the base there; else one before it is missing."""
    found = dict(base)
    for action in actions:
        for name, digest in action.before.items():
            if found.pop(name, digest) != digest:
                raise ValueError(f"an action on {name!r} is missing")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _applied(entry: dict[str, Any]) -> Applied:
    """Parses one action."""
    if not isinstance(entry["replaced"], list):
        raise TypeError("replaced is no list")
    found = Applied(**{**entry, "replaced": tuple(entry["replaced"]), "added": dict(entry["added"])})
    numbers = (found.id, found.tensors, found.nonzeros, *found.added.values())
    if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers) or found.id >= 1 << 31:
        raise ValueError("a number of another type, or too large")
    texts = (found.file, found.digest, found.undo, *found.replaced, *found.added)
    if not all(type(text) is str and text.encode() is not None for text in texts):
        raise ValueError("a text of another type")
    if type(found.strength) not in (int, float) or not abs(found.strength) <= _LARGEST_STRENGTH:
        raise ValueError("a strength that is no number")
    if not _SHA256.fullmatch(found.digest):
        raise ValueError("the digest of a delta is none")
    if type(found.successor) is not bool:
        raise ValueError("successor is neither true nor false")
    _label(found.label)
    for name in found.replaced:
        _check_name(name)
    if found.added and not found.replaced:
        raise ValueError("tensors were added, but no file was rewritten")
    before, after = _digests(found.before), _digests(found.after)
    if found.undo and not _SHA256.fullmatch(found.undo):
        raise ValueError("undo is no digest")
    if before and not set(found.replaced) == set(after) <= set(before):
        raise ValueError("files without their digests")
    return found


def _label(found: Any) -> str:
    if type(found) is not str or not _LABEL.fullmatch(found):
        raise ValueError("a label of another form")
    return found


def _digests(found: Any) -> dict[str, str]:
    """Checks a mapping from weight files to digests."""
    for name, digest in dict(found).items():
        _check_name(name)
        if type(digest) is not str or not _SHA256.fullmatch(digest):
            raise ValueError(f"{name!r} has no digest")
    return dict(found)


def _check_name(name: Any) -> None:
    if type(name) is not str or not _WEIGHT_FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no weight file of this folder")
    name.encode()
