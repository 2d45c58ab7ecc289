"""`apply`: patches a delta into the weight files of a model's folder, in place, all or nothing.

The steps: lock the folder; read and check everything; write the undo delta; write the pending action to the journal;
patch and sync the weights; move the action to the applied ones.  After any interruption the undo delta restores the
folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, TargetError
from shiradelta.folder import restructure
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.copying import copied
from shiradelta.folder.digests import digest_of, digests_meanwhile, model_files
from shiradelta.folder.journal import FOLDER, Journal, locked, originals_name, undo_name
from shiradelta.folder.plan import Edit, FolderPlan, make_plan
from shiradelta.folder.recode import plain_on
from shiradelta.folder.recovery import give_up, recover
from shiradelta.folder.state import Applied, FolderState, check_names
from shiradelta.folder.verification import existing
from shiradelta.folder.weights import WeightFiles, check_writable, checkpoint_for, relative_files
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.windows import windows_of
from shiradelta.io.download import local_model
from shiradelta.io.hub import hub_path, origin_of
from shiradelta.io.reader import DELTA, Delta, open_delta
from shiradelta.io.writer import DeltaWriter, writing_to
from shiradelta.models.checkpoint import Checkpoint, other_weight_files
from shiradelta.models.compatibility import Remedies
from shiradelta.models.stacking import StackFit, StackWords
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import open_signed
from shiradelta.util.arguments import checked
from shiradelta.util.directory import Directory
from shiradelta.util.files import NOTHING_CHANGED, os_errors, system_error
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.progress import Progress

Path_ = str | os.PathLike[str]
_WORDS = StackWords(
    "the deltas on the folder",
    Remedies("it has been applied before", "--no-check to apply it to this one"),
    "revert those that do not belong under it",
    "leave --strength at 1",
)


@dataclass(frozen=True)
class ApplyReport:
    """Report of `apply`.

    Attributes:
        folder: the patched folder.
        tensors: number of tensors with patched elements.
        nonzeros: number of nonzeros in the delta.
        changed: number of elements whose bits changed.
        added: number of tensors that were added, or put in the place of another.
        dropped: number of tensors that were removed, or replaced.
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


@checked(delta=DELTA)
def apply(
    model_dir: Path_,
    delta: Delta | Path_,
    out: Path_ | None = None,
    strength: float = 1.0,
    *,
    check: bool = True,
    allow_dtype: bool = False,
    key: Keys | None = None,
    signature: Path_ | None = None,
    lock: bool = True,
    progress: Progress | None = None,
    limit: int | str | None = None,
) -> ApplyReport:
    """Patches a delta into the safetensors files of a model's folder.  On every error the weights stay as they were.

    A delta may have been made for the folder's base, or be a successor: made for what the deltas on it give.

    Args:
        model_dir: the folder: a single model.safetensors, a sharded model, or a pipeline of such folders; with `out`
            also `user/repo[@revision][/folder]` on the Hub.
        delta: the `.shd` file.
        out: a new folder for a patched copy; None patches in place.
        strength: alpha, the factor of the values.
        check: refuse a base whose fingerprint differs, or whose files have changed since the last revert.
        allow_dtype: accept a base of another dtype than the delta was made against; it cannot be checked then.
        key: a file of public keys, or several: refuse what is not signed by one of them (see `verify_signature`).
        signature: the signature file; None for the name of `delta` with ".sig" behind it.
        lock: False does without the lock against other processes, on a file system that has none.
        progress: called with (what, done, total).
        limit: for a path, the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        BaseMismatchError: the delta does not fit.
        DeltaError: the delta cannot have this strength.
        TargetError: the folder cannot be written.
        FormatError: the delta is refused.
        LimitError: a tensor takes more memory than `limit` allows.
        SignatureError: it is not signed by any of the keys.
    """
    if key is not None and isinstance(delta, Delta):
        raise ArgumentError("an open delta has no signature beside it; give the path of the file")
    if key is None and signature is not None:
        raise ArgumentError("a signature proves nothing without a key; give the public key, too")
    root = existing(_own_folder(model_dir) if out is None else local_model(model_dir))
    with ExitStack() as stack:
        if isinstance(delta, Delta):
            opened = delta
        else:
            opened = stack.enter_context(
                open_delta(delta, limit=limit) if key is None else open_signed(delta, key, signature, limit=limit)[0]
            )
        if out is None:
            return _apply_in_place(root, opened, strength, check, allow_dtype, lock, progress)
        checkpoint_for(root, opened)  # refused before anything is copied
        with copied(root, Path(out)) as copy:
            report = _apply_in_place(copy, opened, strength, check, allow_dtype, lock, progress)
        return replace(report, folder=os.fspath(out))


def apply_step(root: Path, delta: Delta, before: str, after: str, progress: Progress | None = None) -> ApplyReport:
    """`apply` of an open delta in place, to weights that are called something.

    Args:
        root: the model's folder.
        delta: the delta, which is compared with the weights and has strength 1.
        before: what the weights are called, as `FolderState.current` has it.
        after: what they are called afterwards.
        progress: called with (what, done, total).

    Raises:
        TargetError: they are called otherwise; and as `apply`, whose other errors are those of this function, too.
    """
    return _apply_in_place(root, delta, 1.0, True, False, True, progress, before, after)


def _own_folder(model_dir: Path_) -> Path_:
    """The folder, which is to be patched in place.

    Raises:
        TargetError: it is on the Hub, or in the Hub's cache.
    """
    problem = None
    if hub_path(model_dir) is not None:
        problem = "no such folder here, and nothing on the Hub is patched in place"
    elif origin_of(model_dir) is not None:
        problem = "is in the Hub's cache, which others use, too"
    if problem is not None:
        raise TargetError(f"{os.fspath(model_dir)}: {problem}; give --out FOLDER (out=) for a patched copy")
    return model_dir


def _apply_in_place(
    root: Path,
    delta: Delta,
    strength: float,
    check: bool,
    allow_dtype: bool,
    lock: bool,
    progress: Progress | None,
    expected: str | None = None,
    label: str = "",
) -> ApplyReport:
    arithmetic.alpha_of(strength)  # refused before anything is written
    if not delta.needs_base:
        delta.verify()  # the digest that it carries tells deltas apart
    with os_errors(root, "cannot be read"):
        if not os.path.lexists(root / FOLDER):
            _check_writable(root, delta)
    with os_errors(root, "cannot be read"), locked(root, lock=lock) as journal:
        recover(journal)
        if expected not in (None, journal.state.current):
            raise TargetError(f"{root}: another process has changed this folder; try again when it is done")
        for applied in journal.state.applied:
            if applied.digest == delta.digest:
                raise TargetError(f"{root}: {applied.file} is applied already; revert it first")
        with WeightFiles(journal.folder, _check_writable(root, delta)) as files, ExitStack() as stack:
            checkpoint = checkpoint_for(root, delta)
            files.check()
            if delta.needs_base:
                delta = stack.enter_context(plain_on(journal, checkpoint, delta, progress))
            plan = make_plan(checkpoint, delta, strength, allow_dtype)
            files.reserve_space()
            others = [f"{file.relative_to(root)} is left as it is" for file in other_weight_files(checkpoint)]
            before = journal.state
            entry = Applied(
                id=max((applied.id for applied in before.applied), default=0) + 1,
                file=os.path.basename(delta.file or delta.digest[:12]),
                digest=delta.digest,
                strength=float(strength),
                tensors=len(delta),
                nonzeros=delta.nnz,
                added={name: tensor.result_fingerprint or 0 for name, tensor in plan.new},
                label=label,
            )
            try:
                entry, base, changed = _prepare(journal, entry, checkpoint, plan, delta, check, progress)
                files.check()
                _carry_out(journal, replace(before, base=base), entry, files, plan, progress)
            except BaseException as error:
                ending = give_up(journal, before, entry)
                if isinstance(error, OSError):
                    raise system_error(error, root, ending=ending) from error
                if ending != NOTHING_CHANGED:
                    problem = error.problem if isinstance(error, TargetError) else str(error)
                    raise TargetError(problem or type(error).__name__, ending=ending) from error
                raise
        return ApplyReport(
            folder=os.fspath(root),
            tensors=len(plan.edits),
            nonzeros=delta.nnz,
            changed=changed,
            added=len(plan.new),
            dropped=len(plan.drop),
            stack=len(journal.state.applied),
            warnings=(*_unchecked(plan, delta), *_resized(plan), *others),
        )


def _check_writable(root: Path, delta: Delta) -> list[str]:
    """The weight files of a folder, which can be written in place and recorded."""
    checkpoint = checkpoint_for(root, delta)
    every = model_files(checkpoint)
    with os_errors(root), Directory(root) as folder:
        check_writable(folder, every)
    check_names(root, every)
    return relative_files(checkpoint)


def _prepare(
    journal: Journal,
    entry: Applied,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    delta: Delta,
    check: bool,
    progress: Progress | None,
) -> tuple[Applied, Mapping[str, str], int]:
    """Writes all that takes the action back.

    Returns:
        The action, complete; the digests of the base's files; the number of elements that change.
    """
    undo_folder, name = journal.undo_folder(), undo_name(entry)
    undo_folder.remove(originals_name(entry))
    applied = journal.state.applied
    edited = {edit.slot.file.relative_to(checkpoint.root).as_posix() for edit in plan.edits}
    touched = edited | restructure.rewritten_files(checkpoint, plan)
    with digests_meanwhile(journal.folder, touched if applied else model_files(checkpoint)) as digests:
        with undo_folder.replacing(name) as output, writing_to(output, scratch=undo_folder.path) as writer:
            changed, successor = _write_undo(writer, journal, entry, checkpoint, plan, check, delta, progress)
        after: dict[str, str] = {}
        if plan.restructures:
            originals = undo_folder.make_folder(originals_name(entry))
            after = restructure.prepare(journal.folder, checkpoint, plan, originals, entry.strength)
        now = digests()
    if check and not applied:
        _check_base(journal, now)
    entry = replace(
        entry,
        replaced=tuple(after),
        before={file: now[file] for file in sorted(touched)},
        after=after,
        undo=digest_of(undo_folder, name),
        successor=successor,
    )
    return entry, journal.state.base if applied else now, changed


def _check_base(journal: Journal, now: Mapping[str, str]) -> None:
    """Checks that the files of a folder without deltas are the recorded base's.

    Raises:
        TargetError: something else has changed them since.
    """
    base = journal.state.base
    changed = sorted(file for file in {*base, *now} if base.get(file) != now.get(file))
    if base and changed:
        raise TargetError(
            f"{journal.root / changed[0]}: is not as the last revert or commit left it (SHA-256); restore it, or make"
            " the present weights the base with `shiradelta commit`"
        )


def _carry_out(
    journal: Journal,
    below: FolderState,
    entry: Applied,
    files: WeightFiles,
    plan: FolderPlan,
    progress: Progress | None,
) -> None:
    """Changes the weights, between two entries in the journal."""
    edits = [edit for edit in plan.edits if edit.slot.file.relative_to(journal.root).as_posix() not in entry.replaced]
    files.map(edit.slot.file for edit in edits)
    with interrupts_held_back() as deliver:

        def between(what: str, done: int, total: int) -> None:
            deliver()
            if progress:
                progress(what, done, total)

        journal.save(replace(below, pending=entry))
        originals = journal.originals(entry)
        if originals is not None:
            files.close(entry.replaced)
            restructure.swap_in(journal.folder, originals, entry.replaced)
        files.patch(((edit.slot, edit.tensor) for edit in edits), entry.strength, len(edits), between)
        journal.save(replace(below, applied=(*below.applied, entry)))


def _unchecked(plan: FolderPlan, delta: Delta) -> list[str]:
    """A warning if the delta does not say which base it was made against."""
    if not plan.edits or any(edit.tensor.base_fingerprint is not None for edit in plan.edits):
        return []
    file = os.path.basename(delta.file or "the delta")
    return [f"{file} has no fingerprints to compare with this base; convert with --base to get some"]


def _resized(plan: FolderPlan) -> list[str]:
    """A warning if a tensor has another shape now, which the folder's config.json may contradict."""
    return [
        f"{edit.name!r} has shape {list(edit.tensor.shape)} now, and had {list(edit.slot.shape)}; config.json and the"
        " tokenizer have to be the fine-tune's, too"
        for edit in plan.drop
        if edit.tensor.operation.replaces and edit.tensor.shape != edit.slot.shape
    ]


def _write_undo(
    writer: DeltaWriter,
    journal: Journal,
    entry: Applied,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    check: bool,
    delta: Delta,
    progress: Progress | None,
) -> tuple[int, bool]:
    """Checks every fingerprint and writes the undo delta.

    Returns:
        The number of elements that change; whether the delta is a successor of those on the folder.
    """
    changed = 0
    with ExitStack() as stack:
        above = reversed(journal.state.applied)
        undos = [(applied, stack.enter_context(journal.open_undo(applied))) for applied in above]
        fit = StackFit(delta.file or "delta", _WORDS, bool(undos), entry.strength)
        edits = (*plan.drop, *plan.edits)
        for number, edit in enumerate(edits):
            if progress:
                progress("checking", number, len(edits))
            present = None
            if check and (edit.tensor.operation.removes or edit.tensor.dtype == edit.slot.dtype.name):
                own = _undos_of(edit.name, undos)
                fits = [
                    PastBits(edit.slot, each).fingerprint(edit.tensor) for each in ([own, ()] if any(own) else [()])
                ]
                present = fits[-1]
                fit.check(edit.name, edit.tensor, fits[0], present)
            if edit.tensor.operation.removes:
                continue
            counts: list[int] = []
            past = _replaced(edit, entry.strength, counts.append, f"{entry.file}: tensor {edit.name!r}")
            undo = writer.add_set(edit.name, edit.tensor, edit.slot.dtype, past)
            own_base = present is not None and present == edit.tensor.base_fingerprint and entry.strength == 1
            if own_base and edit.tensor.result_fingerprint not in (None, undo.base_fingerprint):
                raise BaseMismatchError(
                    f"{delta.file or 'delta'}: tensor {edit.name!r} does not become what its fingerprint says; get the"
                    " file again"
                )
            changed += sum(counts)
    return changed, fit.is_successor


def _undos_of(name: str, undos: Iterable[tuple[Applied, Delta]]) -> list[TensorDelta]:
    """What takes back the deltas on a tensor, the last one's first, down to the one that added it."""
    found: list[TensorDelta] = []
    for applied, undo in undos:
        if name in applied.added:
            break
        if (own := undo.get(name)) is not None:
            found.append(own)
    return found


def _replaced(
    edit: Edit, strength: float, count: Callable[[int], None], where: str
) -> Iterator[tuple[Positions, Array, Array]]:
    """(positions, the elements there, what replaces them), in windows; counts the elements that change."""
    present = PastBits(edit.slot)
    for positions, bits in windows_of(edit.tensor):
        old = present.at(positions)
        try:
            new = arithmetic.result(edit.tensor.operation, bits, old, edit.slot.dtype.name, strength)
        except DeltaError:
            raise arithmetic.out_of_range(where) from None
        count(int(np.count_nonzero(new != old)))
        yield positions, old, new
