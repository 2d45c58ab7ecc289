"""`apply`: patches a delta into the weight files of a model's folder, in place, all or nothing.

The steps: lock the folder; read and check everything; write the undo delta; write the pending action to the journal;
patch and sync the weights; move the action to the applied ones.  After any interruption the undo delta restores the
folder.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import TargetError
from shiradelta.folder import restructure
from shiradelta.folder.copying import copied
from shiradelta.folder.journal import Applied, FolderState, Journal, locked
from shiradelta.folder.plan import FolderPlan, make_plan
from shiradelta.folder.recovery import check_writable, patch, recover, reserve_space, undo, without
from shiradelta.folder.verification import existing
from shiradelta.format import arithmetic
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta, open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint, other_weight_files
from shiradelta.models.compatibility import Remedies, check_fingerprint
from shiradelta.util.files import os_errors, sync_directory
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress

Path_ = str | os.PathLike[str]
_REMEDIES = Remedies("it has been applied before", "--no-check to apply it to this one")


@dataclass(frozen=True)
class ApplyReport:
    """Report of `apply`.

    Attributes:
        folder: the patched folder.
        tensors: number of tensors with patched elements.
        nonzeros: number of nonzeros in the delta.
        changed: number of elements whose bits changed.
        added: number of tensors that were added.
        dropped: number of tensors that were removed.
        stack: number of deltas on the folder now.
        warnings: warnings for the user.
    """

    folder: str
    tensors: int
    nonzeros: int
    changed: int
    added: int
    dropped: int
    stack: int
    warnings: tuple[str, ...] = ()


def apply(
    model_dir: Path_,
    delta: Delta | Path_,
    out: Path_ | None = None,
    strength: float = 1.0,
    *,
    check: bool = True,
    allow_dtype: bool = False,
    progress: Progress | None = None,
) -> ApplyReport:
    """Patches a delta into the safetensors files of a model's folder.  On every error the weights stay as they were.

    Args:
        model_dir: the folder: a single model.safetensors, a sharded model, or a pipeline of such folders.
        delta: the `.shd` file.
        out: a new folder for a patched copy; None patches in place.
        strength: alpha, the factor of the values.
        check: refuse a base whose fingerprint differs.
        allow_dtype: accept a base of another dtype than the delta was made against; it cannot be checked then.
        progress: called with (what, done, total).

    Raises:
        BaseMismatchError: the delta does not fit.
        DeltaError: the delta cannot have this strength.
        TargetError: the folder cannot be written.
        FormatError: the delta is refused.
    """
    root = existing(model_dir)
    with ExitStack() as stack:
        opened = delta if isinstance(delta, Delta) else stack.enter_context(open_delta(delta))
        if out is None:
            return _apply_in_place(root, opened, strength, check, allow_dtype, progress)
        with copied(root, Path(out)) as copy:
            report = _apply_in_place(copy, opened, strength, check, allow_dtype, progress)
        return replace(report, folder=os.fspath(out))


def _apply_in_place(
    root: Path, delta: Delta, strength: float, check: bool, allow_dtype: bool, progress: Progress | None
) -> ApplyReport:
    arithmetic.alpha_of(strength)  # refused before anything is written
    with locked(root) as journal:
        recover(journal)
        for entry in journal.state.applied:
            if entry.digest == delta.digest:
                raise TargetError(f"{root}: {entry.file} is applied already; revert it first")
        checkpoint = open_checkpoint(root)
        plan = make_plan(checkpoint, delta, strength, allow_dtype)
        entry = Applied(
            id=max((applied.id for applied in journal.state.applied), default=0) + 1,
            file=os.path.basename(delta.file or delta.digest[:12]),
            digest=delta.digest,
            strength=strength,
            tensors=len(delta),
            nonzeros=delta.nnz,
            added={name: tensor.result_fingerprint or 0 for name, tensor in plan.new},
        )
        check_writable(checkpoint)
        reserve_space(checkpoint)
        with os_errors(journal.path):
            (journal.path / "undo").mkdir(exist_ok=True)
            sync_directory(journal.path)
        try:
            changed = _write_undo(
                journal, entry, checkpoint, plan, strength=strength, check=check, delta=delta, progress=progress
            )
            if plan.restructures:
                entry = replace(entry, replaced=restructure.prepare(checkpoint, plan, journal.originals(entry)))
            with interrupts_held_back() as deliver:
                journal.save(FolderState(journal.state.applied, entry))
                if plan.restructures:
                    restructure.swap_in(root, journal.originals(entry), entry.replaced)
                    plan = _relocated(plan, open_checkpoint(root))

                def between(what: str, done: int, total: int) -> None:
                    deliver()
                    if progress:
                        progress(what, done, total)

                with os_errors(root):
                    patch(((edit.slot, edit.tensor) for edit in plan.edits), strength, len(plan.edits), between)
                journal.save(FolderState((*journal.state.applied, entry)))
        except BaseException:
            if journal.state.pending is not None:
                undo(journal, journal.state.pending, None)
            journal.tidy()
            raise
        others = (f"{file} is left as it is" for file in other_weight_files(checkpoint))
        return ApplyReport(
            folder=os.fspath(root),
            tensors=len(plan.edits),
            nonzeros=delta.nnz,
            changed=changed,
            added=len(plan.new),
            dropped=len(plan.drop),
            stack=len(journal.state.applied),
            warnings=(*_unchecked(plan, delta), *others),
        )


def _unchecked(plan: FolderPlan, delta: Delta) -> list[str]:
    """A warning if the delta does not say which base it was made against."""
    if not plan.edits or any(edit.tensor.base_fingerprint is not None for edit in plan.edits):
        return []
    file = os.path.basename(delta.file or "the delta")
    return [f"{file} has no fingerprints to compare with this base; convert with --base to get some"]


def _relocated(plan: FolderPlan, checkpoint: Checkpoint) -> FolderPlan:
    """Updates a plan to the offsets of the rewritten files."""
    return replace(plan, edits=tuple(replace(edit, slot=checkpoint[edit.name]) for edit in plan.edits))


def _write_undo(
    journal: Journal,
    entry: Applied,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    *,
    strength: float,
    check: bool,
    delta: Delta,
    progress: Progress | None,
) -> int:
    """Checks every fingerprint and writes the undo delta; returns the number of elements that change."""
    undos = [open_delta(journal.undo_file(applied)) for applied in reversed(journal.state.applied)]
    backend = choose()
    changed = 0
    with ExitStack() as stack:
        for undo in undos:
            stack.enter_context(undo)
        writer = stack.enter_context(writing(journal.undo_file(entry)))
        for number, edit in enumerate(plan.edits):
            if progress:
                progress("checking", number, len(plan.edits))
            positions = edit.tensor.positions()
            old = checkpoint.bits(edit.name)[positions]
            if check and edit.tensor.dtype == edit.slot.dtype.name:
                view = old
                for undo in undos:
                    view = without(view, positions, undo.get(edit.name))
                where = f"{delta.file or 'delta'}: tensor {edit.name!r}"
                recorded = edit.tensor.base_fingerprint, edit.tensor.result_fingerprint
                check_fingerprint(where, backend.fingerprint(positions, view), *recorded, _REMEDIES)
            new = arithmetic.result(edit.tensor.operation.adds, edit.tensor.bits(), old, edit.slot.dtype.name, strength)
            changed += int(np.count_nonzero(new != old))
            undo_tensor = TensorDelta(edit.slot.shape, positions, old, edit.slot.dtype.name, "set", base_bits=new)
            writer.add(edit.name, undo_tensor)
    return changed
