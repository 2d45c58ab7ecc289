"""`list`: which deltas are on a model's folder."""

from __future__ import annotations

import os

from shiradelta.folder.journal import reading
from shiradelta.folder.lost import check_recorded
from shiradelta.folder.state import FolderState
from shiradelta.folder.verification import existing
from shiradelta.util.files import os_errors


def recorded(model_dir: str | os.PathLike[str]) -> FolderState:
    """What is recorded of a model's folder: the deltas on it, an interrupted action, and digests of the base's files.

    The weights are not looked at; `verify` does that.

    Args:
        model_dir: the folder.

    Raises:
        TargetError: there is no such folder, its record is damaged or missing, or another process is changing it.
    """
    root = existing(model_dir)
    with os_errors(root, "cannot be read"), reading(root) as journal:
        if journal is None:
            return FolderState()
        check_recorded(journal)
        return journal.state
