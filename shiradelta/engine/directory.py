"""`apply`, `revert` and `verify` on a model's folder: in place, all or nothing, bit for bit.

The order of an apply: lock; read and check everything; write the undo delta; write the pending action; patch and
sync the weights; make the action count.  Whatever interrupts it, the undo delta takes the folder back.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shiradelta import arithmetic
from shiradelta.arithmetic import Array, Positions
from shiradelta.backend import choose
from shiradelta.checkpoint import Checkpoint, Slot, open_checkpoint
from shiradelta.delta import TensorDelta
from shiradelta.engine import restructure
from shiradelta.engine.plan import Plan, check_fingerprint, make_plan
from shiradelta.engine.state import FOLDER, Applied, State, StateFolder, locked
from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.files import os_errors, sync_directory
from shiradelta.reader import Delta, StoredTensor, open_delta
from shiradelta.writer import writing

Path_ = str | os.PathLike[str]
#: Called with (what, done, total) while work goes on.
Progress = Callable[[str, int, int], None]


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


@dataclass(frozen=True)
class RevertReport:
    """What `revert` did."""

    delta: Applied
    interrupted: bool  # it was not whole: an interrupted action was rolled back
    left: int  # deltas that are still on the folder


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    state: str  # "base", "patched" or "neither"
    applied: tuple[Applied, ...]
    detail: str
    recovered: bool  # an interrupted action was rolled back first


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
    root = _existing(model_dir)
    with ExitStack() as stack:
        opened = delta if isinstance(delta, Delta) else stack.enter_context(open_delta(delta))
        if out is None:
            return _apply_in_place(root, opened, strength, check, allow_dtype, progress)
        with _copied(root, Path(out)) as copy:
            report = _apply_in_place(copy, opened, strength, check, allow_dtype, progress)
        return replace(report, folder=os.fspath(out))


def revert(model_dir: Path_, progress: Progress | None = None) -> RevertReport:
    """Takes the last delta out again, bit for bit; an interrupted action is rolled back instead.

    Raises:
        TargetError: nothing is applied, or the folder cannot be written.
    """
    root = _existing(model_dir)
    _refuse_untouched(root)
    with locked(root) as folder:
        interrupted = _recover(folder)
        if interrupted is not None:
            return RevertReport(interrupted, True, len(folder.state.applied))
        if not folder.state.applied:
            raise TargetError(f"{root}: no delta is applied to it; nothing to revert")
        top = folder.state.applied[-1]
        _check_writable(root, folder, top)
        folder.save(State(folder.state.applied[:-1], top))
        _undo(folder, top, progress)
        return RevertReport(top, False, len(folder.state.applied))


def verify(model_dir: Path_, delta: Delta | Path_ | None = None) -> VerifyReport:
    """Says whether a folder is exactly its base, exactly patched, or neither.

    Every element that an applied delta touched is looked at.  Without an applied delta, `delta`'s own
    fingerprints tell whether the folder is its base or its result at strength 1.
    """
    root = _existing(model_dir)
    if not (root / FOLDER).exists():
        return _verify_unmanaged(root, delta)
    with locked(root) as folder:
        recovered = _recover(folder) is not None
        if not folder.state.applied:
            return replace(_verify_unmanaged(root, delta), recovered=recovered)
        applied = folder.state.applied
        problem = _first_difference(root, folder)
        if problem is None and delta is not None:
            with _opened(delta) as opened:
                if opened.digest not in {entry.digest for entry in applied}:
                    problem = f"{opened.file} is not among the deltas that are applied"
        names = ", ".join(f"{entry.file} at {entry.strength:g}" for entry in applied)
        return VerifyReport(
            "patched" if problem is None else "neither", applied, problem or f"exactly {names}", recovered
        )


@contextmanager
def _opened(delta: Delta | Path_) -> Iterator[Delta]:
    if isinstance(delta, Delta):
        yield delta
    else:
        with open_delta(delta) as opened:
            yield opened


def _existing(model_dir: Path_) -> Path:
    root = Path(model_dir)
    if root.is_file():
        raise TargetError(f"{root}: is a file; give the folder that it is in")
    if not root.is_dir():
        raise TargetError(f"{root}: no such folder; check the path")
    return root


def _refuse_untouched(root: Path) -> None:
    if not (root / FOLDER).exists():
        raise TargetError(f"{root}: no delta is applied to it; nothing to revert")


# ------------------------------------------------------------------------------------------------ apply


def _apply_in_place(
    root: Path, delta: Delta, strength: float, check: bool, allow_dtype: bool, progress: Progress | None
) -> ApplyReport:
    arithmetic.scaled(np.zeros(0, np.float32), strength)  # a strength that cannot be is refused first
    with locked(root) as folder:
        _recover(folder)
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
        )
        _check_links(checkpoint, root)
        with os_errors(folder.path):
            (folder.path / "undo").mkdir(exist_ok=True)
            sync_directory(folder.path)
        try:
            changed = _write_undo(folder, entry, checkpoint, plan, strength, check, delta, progress)
            if plan.restructures:
                entry = replace(entry, replaced=restructure.prepare(checkpoint, plan, folder.originals(entry)))
            folder.save(State(folder.state.applied, entry))
            if plan.restructures:
                restructure.swap_in(root, folder.originals(entry), entry.replaced)
                checkpoint = open_checkpoint(root)
                plan = make_plan_again(checkpoint, plan)
            _patch(((edit.slot, edit.tensor) for edit in plan.edits), strength, len(plan.edits), progress)
            folder.save(State((*folder.state.applied, entry)))
        except BaseException:
            if folder.state.pending is not None:
                _undo(folder, folder.state.pending, None)
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
        )


def make_plan_again(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The same plan in files that were rewritten: only the places differ."""
    edits = tuple(replace(edit, slot=checkpoint[edit.name]) for edit in plan.edits)
    return replace(plan, edits=edits)


def _check_links(checkpoint: Checkpoint, root: Path) -> None:
    """Weights that other folders share (a hub's cache) are never written in place."""
    real = root.resolve()
    for shard in checkpoint.shards:
        status = shard.file.stat()
        linked = shard.file.resolve() != real / shard.file.relative_to(root)
        if linked or status.st_nlink > 1:
            kind = "a link" if linked else "one of several hard links to the same data"
            raise TargetError(
                f"{shard.file}: is {kind}, so other folders would change too; give --out FOLDER for a copy"
            )
        if not os.access(shard.file, os.W_OK):
            raise TargetError(f"{shard.file}: cannot be written; change its permissions, or give --out FOLDER")


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
            if check:
                view = old
                for undo in undos:
                    view = _overlaid(view, positions, undo.get(edit.name))
                check_fingerprint(edit, backend.fingerprint(positions, view), delta.file or "delta")
            new = arithmetic.result(edit.tensor.op == "add", edit.tensor.bits(), old, edit.slot.dtype.name, strength)
            changed += int(np.count_nonzero(new != old))
            undo_tensor = TensorDelta(edit.slot.shape, positions, old, edit.slot.dtype.name, "set", base_bits=new)
            writer.add(edit.name, undo_tensor)
    return changed


def _overlaid(view: Array, positions: Positions, undo: TensorDelta | None) -> Array:
    """`view` with the undo's elements where it has some."""
    if undo is None or not undo.nnz:
        return view
    at = undo.positions()
    slot = np.minimum(np.searchsorted(at, positions), at.size - 1)
    return np.where(at[slot] == positions, undo.bits()[slot], view)


def _patch(edits: Iterable[tuple[Slot, StoredTensor]], strength: float, total: int, progress: Progress | None) -> None:
    """Writes the new elements into the files and makes them durable."""
    with ExitStack() as stack:
        maps: dict[Path, mmap.mmap] = {}
        for number, (slot, tensor) in enumerate(edits):
            if progress:
                progress("patching", number, total)
            if slot.file not in maps:
                stream = stack.enter_context(open(slot.file, "r+b"))
                maps[slot.file] = mmap.mmap(stream.fileno(), 0)
            data = np.frombuffer(maps[slot.file], np.uint8)
            weight = data[slot.offset : slot.offset + slot.nbytes].view(slot.dtype.bits)
            tensor.patch(weight, slot.dtype.name, strength)
        if progress:
            progress("syncing", total, total)
        for mapped in maps.values():
            mapped.flush()


# ------------------------------------------------------------------------------------ revert and recover


def _recover(folder: StateFolder) -> Applied | None:
    """Rolls an interrupted action back; returns what it was about."""
    pending = folder.state.pending
    if pending is not None:
        _undo(folder, pending, None)
    elif folder.state.applied:
        folder.tidy()
    return pending


def _undo(folder: StateFolder, entry: Applied, progress: Progress | None) -> None:
    """Puts the originals of the pending `entry` back; may be repeated any number of times."""
    with os_errors(folder.root, "cannot be restored, run `shiradelta revert` again when it can"):
        restructure.swap_out(folder.root, folder.originals(entry), entry.replaced)
        checkpoint = open_checkpoint(folder.root)
        with open_delta(folder.undo_file(entry)) as undo:
            _patch(((checkpoint[name], tensor) for name, tensor in undo.items()), 1.0, len(undo), progress)
    folder.save(State(folder.state.applied))
    folder.tidy()


def _check_writable(root: Path, folder: StateFolder, entry: Applied) -> None:
    checkpoint = open_checkpoint(root)
    _check_links(checkpoint, root)
    if not folder.undo_file(entry).exists():
        raise TargetError(f"{folder.undo_file(entry)}: is missing; restore the model's files from their source")


# ------------------------------------------------------------------------------------------------ verify


def _first_difference(root: Path, folder: StateFolder) -> str | None:
    """The first tensor that is not as the applied deltas left it."""
    checkpoint = open_checkpoint(root)
    above: list[Delta] = []
    with ExitStack() as stack:
        for entry in reversed(folder.state.applied):
            undo = stack.enter_context(open_delta(folder.undo_file(entry)))
            for name, tensor in undo.items():
                if name not in checkpoint:
                    return f"tensor {name!r} is gone"
                positions = tensor.positions()
                view = checkpoint.bits(name)[positions]
                for other in above:
                    view = _overlaid(view, positions, other.get(name))
                if choose().fingerprint(positions, view) != tensor.base_fingerprint:
                    return f"tensor {name!r} is not as {entry.file} left it"
            above.append(undo)
    return None


def _verify_unmanaged(root: Path, delta: Delta | Path_ | None) -> VerifyReport:
    """No delta is applied here, as far as the folder knows."""
    checkpoint = open_checkpoint(root)
    if delta is None:
        return VerifyReport("base", (), "no delta is applied", False)
    with _opened(delta) as opened:
        label = opened.file or "delta"
        plan = make_plan(checkpoint, opened, 1.0, allow_dtype=True)
        candidates = {"base": "base_fingerprint", "patched": "result_fingerprint"}
        first: dict[str, str] = {}
        known = False
        for edit in plan.edits:
            if edit.tensor.base_fingerprint is None or not edit.tensor.nnz:
                continue
            known = True
            positions = edit.tensor.positions()
            found = choose().fingerprint(positions, checkpoint.bits(edit.name)[positions])
            for state, attribute in candidates.items():
                if found != getattr(edit.tensor, attribute):
                    first.setdefault(state, edit.name)
        if not known:
            raise BaseMismatchError(
                f"{label} was made without its base, so it cannot tell; convert it again with --base, or apply it"
            )
        for state in candidates:
            if state not in first:
                return VerifyReport(
                    state, (), f"exactly the {'base' if state == 'base' else 'result'} of {label}", False
                )
        return VerifyReport("neither", (), f"tensor {first['base']!r} is neither base nor result of {label}", False)


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
        with os_errors(out):
            shutil.copytree(root, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
            shutil.copymode(root, copy)
        yield copy
        with os_errors(out):
            os.replace(copy, out)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
