"""Takes actions back: a revert, an action that was interrupted, or one that has just failed.

Nothing that the journal says is trusted.  Only the folder's own weight files are written, and after an interruption
only if digests show that the result is the files from before the action.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.digests import digests_of
from shiradelta.folder.journal import Journal
from shiradelta.folder.lost import check_recorded
from shiradelta.folder.restructure import put_back, saved_files
from shiradelta.folder.state import Applied, FolderState
from shiradelta.folder.weights import WeightFiles, check_same_tensor, relative_files, slots_of
from shiradelta.io.reader import Delta
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.util.directory import Directory
from shiradelta.util.files import NOTHING_CHANGED, system_error
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress

#: How an error ends after which an action is left half done.
HALF_DONE = "run `shiradelta revert` when the folder can be written, which takes back what was done"
_FORCE = "`shiradelta revert --force` puts the saved bits back all the same"


@dataclass(frozen=True)
class Restoration:
    """What takes an action back.

    Attributes:
        originals: rewritten files whose originals are put back.
        patched: files whose elements are put back.
    """

    originals: tuple[str, ...]
    patched: tuple[str, ...]


def plan_restoration(journal: Journal, entry: Applied, *, proven: bool = False, force: bool = False) -> Restoration:
    """Finds what takes an action back, and checks by digests that it gives the files from before.

    Args:
        journal: the folder's journal.
        entry: the action.
        proven: the elements that were patched have been compared already, or were written by this process.
        force: leave the checks out.

    Raises:
        TargetError: it does not give the files from before, or something is missing.
        OSError: a file cannot be read.
    """
    saved = saved_files(journal.originals(entry), entry.replaced)
    if not entry.before:  # an older version recorded no digests
        if not (proven or force) and (saved or not _at_rest(journal, entry)):
            raise TargetError(
                f"{journal.root}: an action of an older version was interrupted half-way, and it kept no digests to"
                f" check the way back with; {_FORCE}"
            )
        return Restoration(tuple(saved), ())
    in_place = [file for file in entry.before if file not in entry.replaced]
    if proven or force:
        changed = in_place
    else:
        changed = _differ(journal.folder, entry.before, in_place)
        if changed:
            with journal.open_undo(entry) as undo:
                wrong = _differ(journal.folder, entry.before, changed, [undo])
            if wrong:
                raise TargetError(
                    f"{journal.root}: {wrong[0]} was changed by something else since an action was interrupted;"
                    f" {_FORCE}"
                )
    return Restoration(tuple(_moved(journal, entry, saved, force)), tuple(changed))


def _moved(journal: Journal, entry: Applied, saved: list[str], force: bool) -> list[str]:
    """The rewritten files that are to be put back, checked."""
    originals = journal.originals(entry)
    moved = _differ(journal.folder, entry.before, entry.replaced)
    if force or originals is None:
        return [file for file in moved if file in saved]
    foreign = _differ(journal.folder, entry.after, moved)
    damaged = [file for file in moved if file not in saved] or _differ(originals, entry.before, moved)
    if foreign:
        raise TargetError(f"{journal.root}: {foreign[0]} was changed since it was rewritten; {_FORCE}")
    if damaged:
        raise TargetError(
            f"{journal.root}: the original of {damaged[0]} is missing or damaged; restore the model's files from their"
            " source"
        )
    return moved


def _differ(
    folder: Directory, wanted: Mapping[str, str], files: Iterable[str], undos: Sequence[Delta] = ()
) -> list[str]:
    """Those of some files whose digests, with undo deltas applied, are not the wanted ones."""
    return [file for file, digest in digests_of(folder, files, undos).items() if digest != wanted[file]]


def _at_rest(journal: Journal, entry: Applied) -> bool:
    """Whether fingerprints show that every tensor is wholly as before an action, or wholly as after it."""
    checkpoint = open_checkpoint(journal.root, packed=True)
    with journal.open_undo(entry) as undo:
        for name, tensor in undo.items():
            check_same_tensor(journal.root, checkpoint.get(name), name, tensor)
            found = PastBits(checkpoint[name]).fingerprint(tensor)
            if found not in (tensor.base_fingerprint, tensor.result_fingerprint):
                return False
    return True


def restore(journal: Journal, entry: Applied, plan: Restoration, progress: Progress | None) -> None:
    """Writes the saved bits, durably.  It can be repeated after an interruption.

    Raises:
        TargetError: the files are not those that were patched, or are shared with other folders.
        OSError: a file cannot be written.
    """
    originals = journal.originals(entry)
    if plan.originals and originals is not None:
        put_back(journal.folder, originals, plan.originals)
    in_place = [
        file
        for file in entry.before or relative_files(open_checkpoint(journal.root, packed=True))
        if file not in entry.replaced
    ]
    files = plan.patched if entry.before else in_place
    if not files:
        return
    with journal.open_undo(entry) as undo, WeightFiles(journal.folder, files) as weights:
        slots = slots_of(journal.root, in_place)
        weights.check()
        for name, tensor in undo.items():
            if name in slots or not entry.replaced:
                check_same_tensor(journal.root, slots.get(name), name, tensor)
        own = {journal.root / file for file in files}
        edits = [(slots[name], tensor) for name, tensor in undo.items() if name in slots and slots[name].file in own]
        weights.patch(edits, 1.0, len(edits), progress)


def take_back(
    journal: Journal, entry: Applied, progress: Progress | None = None, *, proven: bool = False, force: bool = False
) -> None:
    """Restores the files from before the pending `entry` and clears it; Ctrl-C is held back until it is done.

    The arguments and errors are those of `plan_restoration` and `restore`.
    """
    with interrupts_held_back():
        restore(journal, entry, plan_restoration(journal, entry, proven=proven, force=force), progress)
        applied = tuple(each for each in journal.state.applied if each.id != entry.id)
        journal.save(replace(journal.state, applied=applied, pending=None))
        journal.tidy()


def recover(journal: Journal, *, force: bool = False) -> Applied | None:
    """Rolls back an interrupted action, if there is one, and returns its delta.

    Args:
        journal: the folder's journal, locked.
        force: put the saved bits back even if digests do not show that they give the files from before.

    Raises:
        TargetError: it cannot be rolled back, or the state is missing and a delta is on the folder.
    """
    check_recorded(journal)
    pending = journal.state.pending
    if pending is not None:
        try:
            take_back(journal, pending, force=force)
        except OSError as error:
            raise system_error(error, journal.root, "cannot be restored", HALF_DONE) from error
    journal.tidy()
    return pending


def give_up(journal: Journal, before: FolderState, entry: Applied) -> str:
    """Takes back an apply that has failed, as far as the system lets it; returns what is so, to end an error with.

    What the disk says is read again first, since a save that has failed may have come to pass.
    """
    with interrupts_held_back(), suppress(ShiraDeltaError, OSError):
        journal.load()
        if entry in journal.state.applied:
            journal.save(replace(before, pending=entry, base=journal.state.base))
        if journal.state.pending is not None:
            take_back(journal, entry, proven=True)
        journal.tidy()
    return ending_of(journal, before, "it is applied all the same, but a power cut may lose that")


def ending_of(journal: Journal, before: FolderState, done: str) -> str:
    """What the disk says after a failure, in words that end an error.

    Args:
        journal: the folder's journal.
        before: the state before the action.
        done: what to say if the action has come to pass.
    """
    try:
        journal.load()
    except (ShiraDeltaError, OSError):
        return HALF_DONE
    if journal.state.pending is not None:
        return HALF_DONE
    return NOTHING_CHANGED if journal.state.applied == before.applied else done
