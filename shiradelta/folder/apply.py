"""`apply` and `revert` on a model's folder: in place, all or nothing, bit for bit.

The order of an apply: lock; read and check everything; write the undo delta; write the pending action; patch and
sync the weights; make the action count.  Whatever interrupts it, the undo delta takes the folder back.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import TargetError
from shiradelta.folder import restructure
from shiradelta.folder.plan import Plan, make_plan
from shiradelta.folder.recovery import Progress, check_writable, overlaid, patch, recover, reserve_space, undo
from shiradelta.folder.state import FOLDER, Applied, State, StateFolder, locked
from shiradelta.folder.verification import existing, first_difference
from shiradelta.format import arithmetic
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta, open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint, other_weight_files
from shiradelta.models.fingerprint import Remedies, check_fingerprint
from shiradelta.util.files import os_errors, sync_directory
from shiradelta.util.interrupts import interrupts_held_back

Path_ = str | os.PathLike[str]
_REMEDIES = Remedies("it has been applied before", "--no-check to apply it to this one")


@dataclass(frozen=True)
class ApplyReport:
    """What `apply` did."""

    folder: str
    tensors: int
    nonzeros: int
    changed: int  # elements whose bits are different now
    added: int  # whole tensors
    dropped: int
    stack: int  # deltas on the folder now
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RevertReport:
    """What `revert` did."""

    delta: Applied
    interrupted: bool  # it was not whole: an interrupted action was rolled back
    left: int  # deltas that are still on the folder


def apply(
    model_dir: Path_,
    delta: Delta | Path_,
    out: Path_ | None = None,
    strength: float = 1.0,
    check: bool = True,
    allow_dtype: bool = False,
    progress: Progress | None = None,
) -> ApplyReport:
    """Patches a delta into the safetensors files of a model's folder.

    Args:
        model_dir: the folder: a lone model.safetensors, a sharded model, or a pipeline of such folders.
        delta: the `.shd` file.
        out: a new folder for a patched copy; None patches in place.
        strength: alpha, what the values are multiplied with.
        check: refuse a base whose fingerprint differs.
        allow_dtype: apply also to a base of another dtype than the delta was made against (not checked then).
        progress: is told how far it is.

    Raises:
        BaseMismatchError: the delta does not fit.
        TargetError: the folder cannot be written.
        FormatError: the delta is refused.
        On every error the weights are as before.
    """
    root = existing(model_dir)
    with ExitStack() as stack:
        opened = delta if isinstance(delta, Delta) else stack.enter_context(open_delta(delta))
        if out is None:
            return _apply_in_place(root, opened, strength, check, allow_dtype, progress)
        with _copied(root, Path(out)) as copy:
            report = _apply_in_place(copy, opened, strength, check, allow_dtype, progress)
        return replace(report, folder=os.fspath(out))


def revert(model_dir: Path_, force: bool = False, progress: Progress | None = None) -> RevertReport:
    """Takes the last delta out again, bit for bit; an interrupted action is rolled back instead.

    Args:
        model_dir: the folder.
        force: put the originals back even if the weights were changed since.
        progress: is told how far it is.

    Raises:
        TargetError: nothing is applied, the weights were changed by something else since, or the folder cannot be
            written.
    """
    root = existing(model_dir)
    if not (root / FOLDER).exists():
        raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
    with locked(root) as folder:
        interrupted = recover(folder)
        if interrupted is not None:
            return RevertReport(interrupted, True, len(folder.state.applied))
        if not folder.state.applied:
            raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
        top = folder.state.applied[-1]
        check_writable(open_checkpoint(root))
        if not folder.undo_file(top).exists():
            raise TargetError(f"{folder.undo_file(top)}: is missing; restore the model's files from their source")
        changed = None if force else first_difference(root, folder, [top])
        if changed is not None:
            raise TargetError(f"{root}: {changed}; --force puts the originals back all the same")
        with interrupts_held_back():
            folder.save(State(folder.state.applied[:-1], top))
            undo(folder, top, progress)
        return RevertReport(top, False, len(folder.state.applied))


# ------------------------------------------------------------------------------------------------ apply


def _apply_in_place(
    root: Path, delta: Delta, strength: float, check: bool, allow_dtype: bool, progress: Progress | None
) -> ApplyReport:
    arithmetic.alpha_of(strength)  # one that cannot be is refused first
    with locked(root) as folder:
        recover(folder)
        for entry in folder.state.applied:
            if entry.digest == delta.digest:
                raise TargetError(f"{root}: {entry.file} is applied already; revert it first")
        checkpoint = open_checkpoint(root)
        plan = make_plan(checkpoint, delta, strength, allow_dtype)
        entry = Applied(
            id=max((applied.id for applied in folder.state.applied), default=0) + 1,
            file=os.path.basename(delta.file or delta.digest[:12]),
            digest=delta.digest,
            strength=strength,
            tensors=len(delta),
            nonzeros=delta.nnz,
            added={name: tensor.result_fingerprint or 0 for name, tensor in plan.new},
        )
        check_writable(checkpoint)
        reserve_space(checkpoint)
        with os_errors(folder.path):
            (folder.path / "undo").mkdir(exist_ok=True)
            sync_directory(folder.path)
        try:
            changed = _write_undo(folder, entry, checkpoint, plan, strength, check, delta, progress)
            if plan.restructures:
                entry = replace(entry, replaced=restructure.prepare(checkpoint, plan, folder.originals(entry)))
            with interrupts_held_back() as deliver:
                folder.save(State(folder.state.applied, entry))
                if plan.restructures:
                    restructure.swap_in(root, folder.originals(entry), entry.replaced)
                    plan = _relocated(plan, open_checkpoint(root))

                def between(what: str, done: int, total: int) -> None:
                    deliver()
                    if progress:
                        progress(what, done, total)

                with os_errors(root):
                    patch(((edit.slot, edit.tensor) for edit in plan.edits), strength, len(plan.edits), between)
                folder.save(State((*folder.state.applied, entry)))
        except BaseException:
            if folder.state.pending is not None:
                undo(folder, folder.state.pending, None)
            folder.tidy()
            raise
        return ApplyReport(
            os.fspath(root),
            len(plan.edits),
            delta.nnz,
            changed,
            len(plan.new),
            len(plan.drop),
            len(folder.state.applied),
            (*_unchecked(plan, delta), *(f"{file} is left as it is" for file in other_weight_files(checkpoint))),
        )


def _unchecked(plan: Plan, delta: Delta) -> list[str]:
    """A warning where nothing tells what base a delta was made against."""
    if not plan.edits or any(edit.tensor.base_fingerprint is not None for edit in plan.edits):
        return []
    file = os.path.basename(delta.file or "the delta")
    return [f"{file} has no fingerprints, so nobody knows whether this is its base; convert with --base to get some"]


def _relocated(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The same plan in files that were rewritten: only the places differ."""
    return replace(plan, edits=tuple(replace(edit, slot=checkpoint[edit.name]) for edit in plan.edits))


def _write_undo(
    folder: StateFolder,
    entry: Applied,
    checkpoint: Checkpoint,
    plan: Plan,
    strength: float,
    check: bool,
    delta: Delta,
    progress: Progress | None,
) -> int:
    """Checks every fingerprint and writes the delta that puts the originals back; returns elements that change."""
    undos = [open_delta(folder.undo_file(applied)) for applied in reversed(folder.state.applied)]
    backend = choose()
    changed = 0
    with ExitStack() as stack:
        for undo in undos:
            stack.enter_context(undo)
        writer = stack.enter_context(writing(folder.undo_file(entry)))
        for number, edit in enumerate(plan.edits):
            if progress:
                progress("checking", number, len(plan.edits))
            positions = edit.tensor.positions()
            old = checkpoint.bits(edit.name)[positions]
            if check and edit.tensor.dtype == edit.slot.dtype.name:
                view = old
                for undo in undos:
                    view = overlaid(view, positions, undo.get(edit.name))
                where = f"{delta.file or 'delta'}: tensor {edit.name!r}"
                recorded = edit.tensor.base_fingerprint, edit.tensor.result_fingerprint
                check_fingerprint(where, backend.fingerprint(positions, view), *recorded, _REMEDIES)
            new = arithmetic.result(edit.tensor.op == "add", edit.tensor.bits(), old, edit.slot.dtype.name, strength)
            changed += int(np.count_nonzero(new != old))
            undo_tensor = TensorDelta(edit.slot.shape, positions, old, edit.slot.dtype.name, "set", base_bits=new)
            writer.add(edit.name, undo_tensor)
    return changed


# --------------------------------------------------------------------------------------------------- out


@contextmanager
def _copied(root: Path, out: Path) -> Iterator[Path]:
    """A copy of a folder that becomes `out` if the block ends well, and else leaves no trace."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"{out}: exists already; give a new folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise TargetError(f"{out}: lies inside {root}; give a folder outside it")
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        with os_errors(out), _at_rest(root):
            shutil.copytree(root, copy, dirs_exist_ok=True, ignore=_ignore_lock)
        for path in (copy, *copy.rglob("*")):  # what was read-only is a copy now, to be patched
            path.chmod(path.stat().st_mode | stat.S_IWUSR | (stat.S_IXUSR if path.is_dir() else 0))
        yield copy
        with os_errors(out):
            os.replace(copy, out)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


@contextmanager
def _at_rest(root: Path) -> Iterator[None]:
    """A folder that no other process changes meanwhile, as far as it can be locked."""
    state = root / FOLDER
    with locked(root) if state.exists() and os.access(state, os.W_OK) else nullcontext() as folder:
        if folder is not None:
            recover(folder)
        yield


def _ignore_lock(folder: str, names: list[str]) -> set[str]:
    return {"lock"} & set(names) if Path(folder).name == FOLDER else set()
