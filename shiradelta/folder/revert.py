"""`revert`: takes the last delta out of a model's folder, bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shiradelta.errors import TargetError
from shiradelta.folder.journal import FOLDER, Applied, FolderState, locked
from shiradelta.folder.recovery import check_writable, recover, undo
from shiradelta.folder.verification import existing, first_difference
from shiradelta.models.checkpoint import open_checkpoint
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


def revert(model_dir: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None) -> RevertReport:
    """Takes the last delta out of a model's folder, bit for bit, or rolls back an interrupted action.

    Args:
        model_dir: the folder.
        force: put the originals back even if the weights have changed since.
        progress: called with (what, done, total).

    Raises:
        TargetError: nothing is applied, something else has changed the weights since, or the folder cannot be written.
    """
    root = existing(model_dir)
    if not (root / FOLDER).exists():
        raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
    with locked(root) as journal:
        interrupted = recover(journal)
        if interrupted is not None:
            return RevertReport(interrupted, interrupted=True, left=len(journal.state.applied))
        if not journal.state.applied:
            raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
        top = journal.state.applied[-1]
        check_writable(open_checkpoint(root))
        if not journal.undo_file(top).exists():
            raise TargetError(f"{journal.undo_file(top)}: is missing; restore the model's files from their source")
        changed = None if force else first_difference(root, journal, [top])
        if changed is not None:
            raise TargetError(f"{root}: {changed}; --force puts the originals back all the same")
        with interrupts_held_back():
            journal.save(FolderState(journal.state.applied[:-1], top))
            undo(journal, top, progress)
        return RevertReport(top, interrupted=False, left=len(journal.state.applied))
