"""Verifies whether a model's folder is exactly its base, exactly patched, or neither."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.folder.journal import FOLDER, Applied, Journal, locked
from shiradelta.folder.recovery import recover, without
from shiradelta.io.reader import Delta, StoredTensor, open_delta
from shiradelta.io.recognise import Wanted, explain
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import difference
from shiradelta.models.library import match_names


@dataclass(frozen=True)
class VerifyReport:
    """Report of `verify`.

    Attributes:
        state: "base", "patched" or "neither".
        applied: the deltas on the folder, the last one on top.
        detail: a sentence for people.
        recovered: whether an interrupted action was rolled back first.
    """

    state: str
    applied: tuple[Applied, ...]
    detail: str
    recovered: bool


def verify(model_dir: str | os.PathLike[str], delta: Delta | str | os.PathLike[str] | None = None) -> VerifyReport:
    """Checks whether a folder is exactly its base, exactly patched, or neither.

    Every element that an applied delta changed is compared; other elements are not.  If nothing is applied, the
    fingerprints of `delta` tell whether the folder is its base or its result at strength 1.

    Args:
        model_dir: the folder.
        delta: a delta to look for.

    Raises:
        TargetError: there is no such folder, or an interrupted action cannot be rolled back.
        BaseMismatchError: `delta` has no fingerprints, or nothing in common with the folder.
    """
    root = existing(model_dir)
    with _state_of(root) as (journal, recovered):
        if journal is None or not journal.state.applied:
            return replace(_verify_unmanaged(root, delta), recovered=recovered)
        applied = journal.state.applied
        problem = first_difference(root, journal, applied)
        if problem is None and delta is not None:
            with _opened(delta) as opened:
                if opened.digest not in {entry.digest for entry in applied}:
                    problem = f"{opened.file} is not among the deltas that are applied"
        names = ", ".join(f"{entry.file} at {entry.strength:g}" for entry in applied)
        state = "patched" if problem is None else "neither"
        return VerifyReport(state, applied, problem or f"exactly {names}, at the weights that are changed", recovered)


def existing(model_dir: str | os.PathLike[str]) -> Path:
    """The path of a folder that exists.

    Raises:
        TargetError: there is no such folder.
        SourceError: it holds several models or adapters.
    """
    root = Path(model_dir)
    if not root.is_dir() and (message := explain(root, Wanted.FOLDER)) is not None:
        raise TargetError(message)
    if root.is_file():
        raise TargetError(f"{root}: is a file; give the folder that it is in")
    if not root.is_dir():
        raise TargetError(f"{root}: no such folder; check the path")
    if not (root / FOLDER / "state.json").exists():
        refuse_several(root)
    return root


@contextmanager
def _state_of(root: Path) -> Iterator[tuple[Journal | None, bool]]:
    """(the folder's state, whether something was rolled back); a read-only folder is only read."""
    if not (root / FOLDER).exists():
        yield None, False
    elif os.access(root / FOLDER, os.W_OK):
        with locked(root) as journal:
            yield journal, recover(journal) is not None
    else:
        journal = Journal(root)
        journal.load()
        if journal.state.pending is not None:
            raise TargetError(
                f"{root}: an action on it was interrupted; make the folder writable, so that it can be rolled back"
            )
        yield journal, False


@contextmanager
def _opened(delta: Delta | str | os.PathLike[str]) -> Iterator[Delta]:
    if isinstance(delta, Delta):
        yield delta
    else:
        with open_delta(delta) as opened:
            yield opened


def first_difference(root: Path, journal: Journal, entries: Sequence[Applied]) -> str | None:
    """The first tensor that differs from the state that the last applied deltas left; None if none differs."""
    checkpoint = open_checkpoint(root)
    fingerprint = choose().fingerprint
    above: list[Delta] = []
    with ExitStack() as stack:
        for entry in reversed(entries):
            for name, expected in entry.added.items():
                if name not in checkpoint or _whole_fingerprint(checkpoint, name) != expected:
                    return f"tensor {name!r} is not as {entry.file} added it"
            undo = stack.enter_context(open_delta(journal.undo_file(entry)))
            for name, tensor in undo.items():
                if difference(tensor, checkpoint.get(name)) is not None:
                    return f"tensor {name!r} is gone, or has another shape or dtype"
                positions = tensor.positions()
                view = checkpoint.bits(name)[positions]
                for other in above:
                    view = without(view, positions, other.get(name))
                if fingerprint(positions, view) != tensor.base_fingerprint:
                    return f"tensor {name!r} is not as {entry.file} left it"
            above.append(undo)
    return None


def _whole_fingerprint(checkpoint: Checkpoint, name: str) -> int:
    bits = checkpoint.bits(name)
    return choose().fingerprint(np.arange(bits.size, dtype=np.int64), bits)


def _verify_unmanaged(root: Path, delta: Delta | str | os.PathLike[str] | None) -> VerifyReport:
    """`verify` of a folder on which no delta is recorded."""
    if delta is None:
        open_checkpoint(root)
        return VerifyReport(
            "base",
            (),
            "no delta is recorded here, so nothing was compared; give DELTA to compare with its fingerprints",
            False,
        )
    with _opened(delta) as opened:
        label = opened.file or "delta"
        unlike = _unlike(open_checkpoint(root), opened)
        for state, what in (("base", "base"), ("patched", "result")):
            if unlike[state] is None:
                return VerifyReport(state, (), f"exactly the {what} of {label}, at the weights that it changes", False)
        return VerifyReport("neither", (), f"tensor {unlike['base']!r} is neither base nor result of {label}", False)


def _unlike(checkpoint: Checkpoint, delta: Delta) -> dict[str, str | None]:
    """State -> the first tensor that contradicts it; None if all agree."""
    found = match_names({name: tensor.shape for name, tensor in delta.items()}, checkpoint).names
    unlike: dict[str, str | None] = {"base": None, "patched": None}
    compared = False
    for name, tensor in delta.items():
        verdict = _verdict(checkpoint, found.get(name), tensor)
        if verdict is None:
            continue
        compared = True
        for state in unlike:
            if state not in verdict and unlike[state] is None:
                unlike[state] = name
    if not compared:
        raise BaseMismatchError(
            f"{delta.file or 'delta'}: has no fingerprint of a tensor in {checkpoint.root} to compare; convert it again"
            " with --base"
        )
    return unlike


def _verdict(checkpoint: Checkpoint, name: str | None, tensor: StoredTensor) -> set[str] | None:
    """The states that a tensor agrees with; None if it has no fingerprint."""
    if tensor.operation.creates:
        if name is None:
            return {"base"}
        return {"patched"} if _whole_fingerprint(checkpoint, name) == tensor.result_fingerprint else set()
    if tensor.operation.removes:
        return {"patched" if name is None else "base"}
    if name is None:
        return set()
    if tensor.base_fingerprint is None or not tensor.nnz:
        return None
    if difference(tensor, checkpoint[name]) is not None:
        return set()
    positions = tensor.positions()
    here = choose().fingerprint(positions, checkpoint.bits(name)[positions])
    expected = {"base": tensor.base_fingerprint, "patched": tensor.result_fingerprint}
    return {state for state, value in expected.items() if value == here}
