"""`commit`: makes the present weights of a model's folder its base, or forgets what is recorded of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shiradelta.errors import TargetError
from shiradelta.folder.comparison import first_difference, unlike_base
from shiradelta.folder.digests import digests_of, model_files
from shiradelta.folder.journal import locked
from shiradelta.folder.state import Applied, FolderState, check_names
from shiradelta.folder.verification import existing
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.arguments import checked
from shiradelta.util.files import os_errors
from shiradelta.util.interrupts import interrupts_held_back


@dataclass(frozen=True)
class CommitReport:
    """Report of `commit`.

    Attributes:
        deltas: the deltas that are part of the base now.
        files: number of files whose digests were recorded; 0 after `forget`.
    """

    deltas: tuple[Applied, ...]
    files: int


@checked()
def commit(model_dir: str | os.PathLike[str], *, forget: bool = False, lock: bool = True) -> CommitReport:
    """Makes the present weights of a model's folder its base: the deltas on it cannot be taken out any more.

    The digests of its weight files are recorded, so that `verify` can tell whether it is still this base.

    Args:
        model_dir: the folder.
        forget: record nothing, and delete what is recorded.
        lock: False does without the lock against other processes, on a file system that has none.

    Raises:
        TargetError: an action was interrupted, the weights are not as the deltas left them, or the folder cannot be
            written.
    """
    return make_base(existing(model_dir), forget=forget, lock=lock)


def make_base(root: Path, label: str | None = None, *, forget: bool = False, lock: bool = True) -> CommitReport:
    """`commit` of a folder, whose base is called something.

    Args:
        root: the folder.
        label: what to call it; None for what the present weights are called, if all of them are as they were left.
        forget: as `commit`.
        lock: as `commit`.

    Raises:
        TargetError: as `commit`.
    """
    checkpoint = open_checkpoint(root, packed=True)
    check_names(root, model_files(checkpoint))
    with os_errors(root, "cannot be read"), locked(root, lock=lock) as journal:
        applied = journal.state.applied
        if journal.state.pending is not None:
            raise TargetError(f"{root}: an action was interrupted; run `shiradelta revert` first, which rolls it back")
        changed = first_difference(checkpoint, journal, applied)
        if changed is not None:
            raise TargetError(f"{root}: {changed}; restore the weights first, or delete its .shiradelta folder")
        if label is None:
            label = "" if not journal.state.current or unlike_base(journal) is not None else journal.state.current
        with os_errors(journal.own.path, ending="the deltas can still be taken out"):
            files = {} if forget else digests_of(journal.folder, model_files(checkpoint))
            with interrupts_held_back():
                if forget:
                    journal.forget()
                else:
                    journal.save(FolderState(base=files, label=label))
                    journal.tidy()
        return CommitReport(applied, len(files))
