"""Verifies whether a model's folder is exactly its base, exactly patched, or neither."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from shiradelta.errors import BaseMismatchError, FormatError, ShiraDeltaError, TargetError
from shiradelta.folder.comparison import PastBits, first_difference, unlike_base, unlike_delta
from shiradelta.folder.digests import digests_of
from shiradelta.folder.journal import Journal, reading
from shiradelta.folder.lost import lost_delta
from shiradelta.folder.recode import plain_on
from shiradelta.folder.state import Applied
from shiradelta.folder.weights import checkpoint_for
from shiradelta.io.download import local_model
from shiradelta.io.reader import DELTA, Delta, StoredTensor, open_delta
from shiradelta.io.recognise import Wanted, explain, is_patched
from shiradelta.models.candidates import refuse_several_folders
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import difference
from shiradelta.models.library import match_names
from shiradelta.util.arguments import checked
from shiradelta.util.deprecated import warn_renamed
from shiradelta.util.files import os_errors
from shiradelta.util.text import count


@dataclass(frozen=True)
class VerifyReport:
    """Report of `verify`.

    Attributes:
        state: "base", "patched", "neither", or "unknown" if there is nothing to compare with.
        applied: the deltas on the folder, the last one on top.
        detail: a sentence for people.
        interrupted: whether an action was interrupted, which `revert` rolls back.
    """

    state: str
    applied: tuple[Applied, ...]
    detail: str
    interrupted: bool = False

    @property
    def recovered(self) -> bool:
        """Deprecated: `verify` rolls nothing back any more, so it is always False."""
        warn_renamed("VerifyReport.recovered", "interrupted")
        return False


@checked(delta=DELTA)
def verify(
    model_dir: str | os.PathLike[str],
    delta: Delta | str | os.PathLike[str] | None = None,
    *,
    full: bool = False,
    limit: int | str | None = None,
) -> VerifyReport:
    """Checks whether a folder is exactly its base, exactly patched, or neither; it changes nothing.

    Every element that an applied delta changed is compared.  With `delta`, its own fingerprints and values are, too; if
    nothing is applied, they tell whether the folder is its base or its result at strength 1.  Without it, the digests
    that the last revert left tell whether the folder is its base.

    Args:
        model_dir: the folder, or `user/repo[@revision][/folder]` on the Hub.
        delta: a delta to look for.
        full: compare all weights with the digests of the base's files, those that no delta changes, too.
        limit: for a path, the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        TargetError: there is no such folder, or another process is changing it.
        BaseMismatchError: `delta` has no fingerprints, or nothing in common with the folder.
        FormatError: `delta` is damaged, or carries the digest of another one.
        LimitError: a tensor takes more memory than `limit` allows.
    """
    root = existing(local_model(model_dir))
    with ExitStack() as stack:
        stack.enter_context(os_errors(root, "cannot be read"))
        opened = None if delta is None else stack.enter_context(_opened(delta, limit))
        journal = stack.enter_context(reading(root))
        if opened is not None and not opened.needs_base:
            opened.verify()
        if journal is not None and journal.state.pending is not None:
            return _verify_interrupted(journal, journal.state.pending)
        if opened is not None and opened.needs_base:
            try:
                opened = stack.enter_context(plain_on(journal, checkpoint_for(root, opened), opened))
            except FormatError as error:
                if error.reason != "wrong_base":
                    raise
                return _verify_without_base(journal, opened, error)
        if journal is not None and journal.state.applied:
            return _verify_applied(journal, opened, full)
        recorded = journal if journal is not None and journal.state.base else None
        if opened is not None:
            report = _verify_by_fingerprints(root, opened)
            return _in_full(report, recorded) if full else report
        if journal is not None and (lost := lost_delta(journal)) is not None:
            return VerifyReport("unknown", (), f"{lost}; give DELTA to compare with it")
        if recorded is None:
            checkpoint = open_checkpoint(root, packed=True)
            return VerifyReport(
                "unknown",
                (),
                f"nothing is recorded of {count(checkpoint, 'tensor')} here; give DELTA to compare with it",
            )
        problem = unlike_base(recorded)
        if problem is not None:
            meant = "if that is meant, `shiradelta commit` makes the present weights the base"
            return VerifyReport("neither", (), f"{problem}; {meant}")
        return VerifyReport("base", (), "every weight file is the recorded base's (SHA-256)")


def _verify_applied(journal: Journal, delta: Delta | None, full: bool) -> VerifyReport:
    """`verify` of a folder with deltas on it."""
    applied = journal.state.applied
    checkpoint = open_checkpoint(journal.root, packed=True)
    problem = first_difference(checkpoint, journal, applied)
    if problem is None and delta is not None:
        entry = next((each for each in applied if each.digest == delta.digest), None)
        if entry is None:
            problem = f"{delta.file} is not among the deltas that are applied"
        else:
            problem = unlike_delta(checkpoint, journal, delta, entry)
    names = ", ".join(f"{entry.file} at {entry.strength:g}" for entry in applied)
    if problem is not None:
        return VerifyReport("neither", applied, problem)
    report = VerifyReport("patched", applied, f"exactly {names}, at the weights that are changed")
    return _in_full(report, journal if journal.state.base else None) if full else report


def _in_full(report: VerifyReport, journal: Journal | None) -> VerifyReport:
    """A report, after a comparison of all weights with the digests of the base's files."""
    if report.state == "neither":
        return report
    if journal is None:
        what = "no digests of the base's files are recorded here, so only the listed weights could be compared"
        return replace(report, state="unknown", detail=f"{report.detail}; {what}")
    problem = unlike_base(journal)
    if problem is not None:
        return replace(report, state="neither", detail=problem)
    return replace(report, detail=f"{report.detail}, and all others are the base's (SHA-256)")


def _verify_without_base(journal: Journal | None, delta: Delta, error: FormatError) -> VerifyReport:
    """`verify` of a folder that is not, and was not under its deltas, the base that a delta is read with."""
    if journal is None or not journal.state.applied:
        remedy = "make it plain to compare them with its result: `shiradelta recode FILE OUT --base MODEL`"
        return VerifyReport("unknown", (), f"the weights are not the base of {delta.file or 'delta'}; {remedy}")
    report = _verify_applied(journal, None, False)
    if report.state == "neither":
        return report
    among = any(entry.digest == delta.digest for entry in report.applied)
    problem = str(error) if among else f"{delta.file} is not among the deltas that are applied"
    return replace(report, state="neither", detail=problem)


def _verify_interrupted(journal: Journal, pending: Applied) -> VerifyReport:
    """`verify` of a folder on which an action was interrupted: the weights tell how far it came."""
    applied, how = journal.state.applied, "an action was interrupted; `shiradelta revert` rolls it back"
    if pending.before and digests_of(journal.folder, pending.before) == dict(pending.before):
        state = "patched" if applied else "base"
        return VerifyReport(state, applied, f"the weights are as before it, but {how}", interrupted=True)
    with suppress(ShiraDeltaError):
        if first_difference(open_checkpoint(journal.root, packed=True), journal, (*applied, pending)) is None:
            done = f"{pending.file} at {pending.strength:g} is on it, but {how}"
            return VerifyReport("patched", (*applied, pending), done, interrupted=True)
    return VerifyReport("neither", applied, how, interrupted=True)


def existing(model_dir: str | os.PathLike[str]) -> Path:
    """The path of a folder that exists.

    Raises:
        TargetError: there is no such folder.
        SourceError: it holds several models or adapters.
    """
    root = Path(model_dir)
    with os_errors(root, "cannot be read"):
        if not root.is_dir() and (message := explain(root, Wanted.FOLDER)) is not None:
            raise TargetError(message)
        if root.is_file():
            raise TargetError(f"{root}: is a file; give the folder that it is in")
        if not root.is_dir():
            raise TargetError(f"{root}: no such folder; check the path")
        if not is_patched(root):
            refuse_several_folders(root)
    return root


@contextmanager
def _opened(delta: Delta | str | os.PathLike[str], limit: int | str | None) -> Iterator[Delta]:
    if isinstance(delta, Delta):
        yield delta
    else:
        with open_delta(delta, limit=limit) as opened:
            yield opened


def _verify_by_fingerprints(root: Path, delta: Delta) -> VerifyReport:
    """`verify` of a folder on which no delta is recorded."""
    label = delta.file or "delta"
    unlike = _unlike(checkpoint_for(root, delta), delta)
    for state, what in (("base", "base"), ("patched", "result")):
        if unlike[state] is None:
            return VerifyReport(state, (), f"exactly the {what} of {label}, at the weights that it changes")
    return VerifyReport("neither", (), f"tensor {unlike['base']!r} is neither base nor result of {label}")


def _unlike(checkpoint: Checkpoint, delta: Delta) -> dict[str, str | None]:
    """State -> the first tensor that contradicts it; None if all agree."""
    wanted = {name: None if tensor.operation.replaces else tensor.shape for name, tensor in delta.items()}
    found = match_names(wanted, checkpoint).names
    unlike: dict[str, str | None] = {"base": None, "patched": None}
    compared = False
    for name, tensor in delta.items():
        verdict = _verdict(checkpoint, found.get(name), tensor)
        if verdict is None:
            continue
        compared = True
        for state in unlike:
            if state not in verdict and unlike[state] is None:
                unlike[state] = name
    if not compared:
        raise BaseMismatchError(
            f"{delta.file or 'delta'}: has no fingerprint of a tensor in {checkpoint.root} to compare; convert it again"
            " with --base"
        )
    return unlike


def _verdict(checkpoint: Checkpoint, name: str | None, tensor: StoredTensor) -> set[str] | None:
    """The states that a tensor agrees with; None if it has no fingerprint."""
    if tensor.operation.removes:
        return _of_removed(checkpoint, name, tensor)
    if tensor.operation.creates:
        if name is None:
            return {"base"}
        return {"patched"} if PastBits(checkpoint[name]).fingerprint() == tensor.result_fingerprint else set()
    if name is None:
        return set()
    if tensor.base_fingerprint is None or not tensor.nnz:
        return None
    if difference(tensor, checkpoint[name]) is not None:
        return set()
    here = PastBits(checkpoint[name]).fingerprint(tensor)
    expected = {"base": tensor.base_fingerprint, "patched": tensor.result_fingerprint}
    return {state for state, value in expected.items() if value == here}


def _of_removed(checkpoint: Checkpoint, name: str | None, tensor: StoredTensor) -> set[str] | None:
    """As `_verdict`, of a tensor that goes, for another or for none."""
    replaces = tensor.operation.replaces
    if name is None:
        return set() if replaces else {"patched"}
    here = PastBits(checkpoint[name]).fingerprint()
    if replaces and difference(tensor, checkpoint[name]) is None and here == tensor.result_fingerprint:
        return {"patched"}
    if tensor.base_fingerprint is None:
        return None if replaces else {"base"}
    return {"base"} if here == tensor.base_fingerprint else set()
