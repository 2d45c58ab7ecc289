"""`revert`: takes the last delta out of a model's folder, bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.folder.comparison import first_difference
from shiradelta.folder.journal import FOLDER, Journal, locked
from shiradelta.folder.recovery import ending_of, plan_restoration, recover, restore
from shiradelta.folder.state import Applied, FolderState
from shiradelta.folder.verification import existing
from shiradelta.folder.weights import check_writable, relative_files
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.arguments import checked
from shiradelta.util.files import NOTHING_CHANGED, os_errors, system_error
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress


@dataclass(frozen=True)
class RevertReport:
    """Report of `revert`.

    Attributes:
        delta: the delta that was taken out.
        interrupted: whether an interrupted action was rolled back instead.
        left: number of deltas still on the folder.
    """

    delta: Applied
    interrupted: bool
    left: int


@checked()
def revert(
    model_dir: str | os.PathLike[str], *, force: bool = False, lock: bool = True, progress: Progress | None = None
) -> RevertReport:
    """Takes the last delta out of a model's folder, bit for bit, or rolls back an interrupted action.

    Args:
        model_dir: the folder.
        force: put the originals back even if the weights have changed since.
        lock: False does without the lock against other processes, on a file system that has none.
        progress: called with (what, done, total).

    Raises:
        TargetError: nothing is applied, something else has changed the weights since, or the folder cannot be written.
    """
    root = existing(model_dir)
    if not os.path.lexists(root / FOLDER):
        raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
    with os_errors(root, "cannot be read"), locked(root, lock=lock) as journal:
        interrupted = recover(journal, force=force)
        if interrupted is not None:
            return RevertReport(interrupted, interrupted=True, left=len(journal.state.applied))
        if not journal.state.applied:
            raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
        top = journal.state.applied[-1]
        _take_out(journal, top, force, progress)
        return RevertReport(top, interrupted=False, left=len(journal.state.applied))


def revert_all(
    model_dir: str | os.PathLike[str], *, force: bool = False, lock: bool = True, progress: Progress | None = None
) -> list[RevertReport]:
    """Takes every delta out of a model's folder, the last one first; the arguments and errors are those of `revert`.

    Returns:
        A report for each.  After an error those that were taken out stay out.
    """
    reports = [revert(model_dir, force=force, lock=lock, progress=progress)]
    while reports[-1].left:
        try:
            reports.append(revert(model_dir, force=force, lock=lock, progress=progress))
        except ShiraDeltaError as error:
            out = ", ".join(report.delta.file for report in reports)
            problem, ending = (error.problem, error.ending) if isinstance(error, TargetError) else (str(error), "")
            ending = "nothing else was changed" if ending == NOTHING_CHANGED else ending
            raise TargetError(f"{out} was taken out, and then: {problem}", ending=ending) from error
    return reports


def _take_out(journal: Journal, top: Applied, force: bool, progress: Progress | None) -> None:
    root, before = journal.root, journal.state
    checkpoint = open_checkpoint(root, packed=True)
    check_writable(journal.folder, relative_files(checkpoint))
    if not force and (changed := first_difference(checkpoint, journal, [top])) is not None:
        raise TargetError(f"{root}: {changed}; --force puts the originals back all the same")
    below, started = replace(before, applied=before.applied[:-1]), False
    try:
        plan = plan_restoration(journal, top, proven=True, force=force)
        journal.open_undo(top).close()
        with interrupts_held_back():
            try:
                journal.save(replace(below, pending=top))
                started = True
                restore(journal, top, plan, progress)
                journal.save(below)
            except OSError:
                _stay(journal, before, started)
                raise
            journal.tidy()
    except OSError as error:
        ending = ending_of(journal, before, "the delta is taken out all the same, but a power cut may lose that")
        raise system_error(error, root, "cannot be restored", ending) from error


def _stay(journal: Journal, before: FolderState, started: bool) -> None:
    """Saves the state from before again if no weight was written; without success the next command rolls back."""
    try:
        journal.load()
        if not started and journal.state != before:
            journal.save(before)
    except (ShiraDeltaError, OSError):
        return
