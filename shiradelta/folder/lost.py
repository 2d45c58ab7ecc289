"""What the files in `.shiradelta/` tell where its `state.json` is missing.

A command that was killed before its first record leaves an undo delta, too; but then the weights are what it saved.
"""

from __future__ import annotations

from shiradelta.errors import FormatError, TargetError
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.digests import digest_of
from shiradelta.folder.journal import Journal
from shiradelta.folder.restructure import kept_files
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import difference


def check_recorded(journal: Journal) -> None:
    """Checks that a folder without a state has no delta on it, as far as its undo deltas tell.

    Raises:
        TargetError: it has one.
        OSError: a file cannot be read.
    """
    lost = lost_delta(journal)
    if lost is not None:
        raise TargetError(
            f"{journal.root}: {lost}; put it back, or restore the model's files from their source and delete"
            " .shiradelta (`shiradelta commit` takes the present weights for the base)"
        )


def lost_delta(journal: Journal) -> str | None:
    """What tells that a delta is on a folder whose state is missing; None if nothing does, or there is a state.

    Raises:
        OSError: a file cannot be read.
    """
    names = journal.unrecorded()
    if not names:
        return None
    checkpoint = open_checkpoint(journal.root, packed=True)
    for name in names:
        holds = _is_undone if name.endswith(".shd") else _is_original
        if not holds(journal, checkpoint, name):
            return f"its .shiradelta has no state.json, and undo/{name} holds other weights, so a delta may be on it"
    return None


def _is_undone(journal: Journal, checkpoint: Checkpoint, name: str) -> bool:
    """Whether the elements that an undo delta saved are in the weights."""
    try:
        with journal.open_unrecorded(name) as undo:
            for tensor_name, tensor in undo.items():
                if difference(tensor, checkpoint.get(tensor_name)) is not None:
                    return False
                if not PastBits(checkpoint[tensor_name]).holds(tensor):
                    return False
    except FormatError:
        return False
    return True


def _is_original(journal: Journal, checkpoint: Checkpoint, name: str) -> bool:
    """Whether the originals that a folder keeps are the present files."""
    originals = journal.undo_folder().folder(name)
    for file in kept_files(originals):
        if not (checkpoint.root / file).exists():
            return False
        if digest_of(originals, file) != digest_of(journal.folder, file):
            return False
    return True
