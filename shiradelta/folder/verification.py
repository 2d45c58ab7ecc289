"""Is a model's folder exactly its base, exactly patched, or neither?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.folder.recovery import overlaid, recover
from shiradelta.folder.state import FOLDER, Applied, StateFolder, locked
from shiradelta.io.reader import Delta, StoredTensor, open_delta
from shiradelta.models.checkpoint import Checkpoint, match_names, open_checkpoint


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    state: str  # "base", "patched" or "neither"
    applied: tuple[Applied, ...]
    detail: str
    recovered: bool  # an interrupted action was rolled back first


def verify(model_dir: str | os.PathLike[str], delta: Delta | str | os.PathLike[str] | None = None) -> VerifyReport:
    """Says whether a folder is exactly its base, exactly patched, or neither.

    Every element that an applied delta touched is looked at.  Without an applied delta, `delta`'s own
    fingerprints tell whether the folder is its base or its result at strength 1.

    Raises:
        TargetError: no such folder, or an interrupted action that cannot be rolled back.
        BaseMismatchError: the delta cannot tell: it has no fingerprints, or nothing in common with the folder.
    """
    root = existing(model_dir)
    with _state_of(root) as (folder, recovered):
        if folder is None or not folder.state.applied:
            return replace(_verify_unmanaged(root, delta), recovered=recovered)
        applied = folder.state.applied
        problem = first_difference(root, folder, applied)
        if problem is None and delta is not None:
            with _opened(delta) as opened:
                if opened.digest not in {entry.digest for entry in applied}:
                    problem = f"{opened.file} is not among the deltas that are applied"
        names = ", ".join(f"{entry.file} at {entry.strength:g}" for entry in applied)
        state = "patched" if problem is None else "neither"
        return VerifyReport(state, applied, problem or f"exactly {names}, at the weights that are changed", recovered)


def existing(model_dir: str | os.PathLike[str]) -> Path:
    """The folder, if it is one."""
    root = Path(model_dir)
    if root.is_file():
        raise TargetError(f"{root}: is a file; give the folder that it is in")
    if not root.is_dir():
        raise TargetError(f"{root}: no such folder; check the path")
    return root


@contextmanager
def _state_of(root: Path) -> Iterator[tuple[StateFolder | None, bool]]:
    """(what is applied, whether something had to be rolled back); a folder that cannot be written is only read."""
    if not (root / FOLDER).exists():
        yield None, False
    elif os.access(root / FOLDER, os.W_OK):
        with locked(root) as folder:
            yield folder, recover(folder) is not None
    else:
        folder = StateFolder(root)
        folder.load()
        if folder.state.pending is not None:
            raise TargetError(
                f"{root}: an action on it was interrupted; make it writable, so that it can be rolled back"
            )
        yield folder, False


@contextmanager
def _opened(delta: Delta | str | os.PathLike[str]) -> Iterator[Delta]:
    if isinstance(delta, Delta):
        yield delta
    else:
        with open_delta(delta) as opened:
            yield opened


def first_difference(root: Path, folder: StateFolder, entries: Sequence[Applied]) -> str | None:
    """The first tensor that is not as these deltas, the last ones applied, left it."""
    checkpoint = open_checkpoint(root)
    fingerprint = choose().fingerprint
    above: list[Delta] = []
    with ExitStack() as stack:
        for entry in reversed(entries):
            for name, expected in entry.added.items():
                if name not in checkpoint or _whole_fingerprint(checkpoint, name) != expected:
                    return f"tensor {name!r} is not as {entry.file} added it"
            undo = stack.enter_context(open_delta(folder.undo_file(entry)))
            for name, tensor in undo.items():
                slot = checkpoint.get(name)
                if slot is None or slot.shape != tensor.shape or slot.dtype.name != tensor.dtype:
                    return f"tensor {name!r} is gone, or another"
                positions = tensor.positions()
                view = checkpoint.bits(name)[positions]
                for other in above:
                    view = overlaid(view, positions, other.get(name))
                if fingerprint(positions, view) != tensor.base_fingerprint:
                    return f"tensor {name!r} is not as {entry.file} left it"
            above.append(undo)
    return None


def _whole_fingerprint(checkpoint: Checkpoint, name: str) -> int:
    bits = checkpoint.bits(name)
    return choose().fingerprint(np.arange(bits.size, dtype=np.int64), bits)


def _verify_unmanaged(root: Path, delta: Delta | str | os.PathLike[str] | None) -> VerifyReport:
    """No delta is applied here, as far as the folder knows."""
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
    """State -> the first tensor that speaks against it."""
    found = match_names({name: tensor.shape for name, tensor in delta.items()}, checkpoint)
    unlike: dict[str, str | None] = {"base": None, "patched": None}
    told = False
    for name, tensor in delta.items():
        verdict = _verdict(checkpoint, found.get(name), tensor)
        if verdict is None:
            continue
        told = True
        for state in unlike:
            if state not in verdict and unlike[state] is None:
                unlike[state] = name
    if not told:
        raise BaseMismatchError(
            f"{delta.file or 'delta'}: has no fingerprint of a tensor in {checkpoint.root}, so it cannot tell; convert"
            " it again with --base"
        )
    return unlike


def _verdict(checkpoint: Checkpoint, name: str | None, tensor: StoredTensor) -> set[str] | None:
    """The states that a tensor speaks for; None if it cannot tell."""
    if tensor.op == "new":
        if name is None:
            return {"base"}
        return {"patched"} if _whole_fingerprint(checkpoint, name) == tensor.result_fingerprint else set()
    if tensor.op == "drop":
        return {"patched" if name is None else "base"}
    if name is None:
        return set()
    if tensor.base_fingerprint is None or not tensor.nnz:
        return None
    slot = checkpoint[name]
    if slot.shape != tensor.shape or slot.dtype.name != tensor.dtype:
        return set()
    positions = tensor.positions()
    here = choose().fingerprint(positions, checkpoint.bits(name)[positions])
    expected = {"base": tensor.base_fingerprint, "patched": tensor.result_fingerprint}
    return {state for state, value in expected.items() if value == here}
