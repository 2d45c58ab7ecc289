"""`recode`: turns a delta into the form that is read with its base only, or back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError, FormatError
from shiradelta.folder.comparison import Past
from shiradelta.folder.journal import Journal
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.format.record import Record
from shiradelta.io.context import CONTEXTS, Base, WrittenForm, plain_delta, write_on_base, write_plain
from shiradelta.io.download import local_model
from shiradelta.io.reader import DELTA, Delta, open_delta
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.held import HeldCheckpoint
from shiradelta.models.library import match_names
from shiradelta.util.arguments import MODEL, PATH, checked
from shiradelta.util.files import check_target, replacing
from shiradelta.util.progress import Progress

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class RecodeReport:
    """Report of `recode`.

    Attributes:
        source: the file that was read.
        out: the file that was written.
        needs_base: whether the written file is read with its base only; not if that would make no tensor smaller.
        packed: whether the written file is packed; not if that would make it no smaller.
        tensors: number of tensors.
        nonzeros: number of nonzeros.
        source_bytes: size of the first file.
        file_bytes: size of the second.
        digest: the content digest of both, hexadecimal.
    """

    source: str
    out: str
    needs_base: bool
    packed: bool
    tensors: int
    nonzeros: int
    source_bytes: int
    file_bytes: int
    digest: str


@checked(source=DELTA, out=PATH, base=MODEL)
def recode(
    source: Delta | Path_,
    out: Path_,
    base: Path_ | Mapping[str, Any],
    *,
    context: str | None = None,
    progress: Progress | None = None,
    limit: int | str | None = None,
) -> RecodeReport:
    """Writes a delta in another form: the smaller one that is read with its base only, or the plain one.

    Both have the same digest.  The smaller form is for a file on its way to where the base is: the base's elements tell
    where changes are likely (spec/FORMAT.md, 4.7 and 5.2), and table and names are packed (2.3).  A tensor that would
    not become smaller stays as it is.

    Args:
        source: the `.shd` file, of either form.
        out: the file to write; it may be `source`.
        base: the model that the delta was made for: a folder, a file, or `user/repo[@revision][/folder]` on the Hub;
            or its tensors by name.
        context: "base" for the smaller form, "none" for the plain one; None for the one that the file does not have.
        progress: called with (tensor, done, total).
        limit: for a path, the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        ArgumentError: there is no such form.
        FormatError: the file is damaged, or was made for another base.
        LimitError: a tensor takes more memory than `limit` allows.
        SourceError: there is no such model.
        TargetError: the file cannot be written, or `out` is a file of another kind.
    """
    if context not in (None, *CONTEXTS):
        raise ArgumentError(f"context is {context!r}, which is none of {', '.join(CONTEXTS)}")
    check_target(Path(out), registry.MAGIC, "a .shd file")
    if isinstance(base, Mapping):
        checkpoint: Checkpoint = HeldCheckpoint("base", base)
    else:
        checkpoint = open_checkpoint(Path(local_model(base)), Wanted.BASE, packed=True)
    with ExitStack() as stack:
        delta = source if isinstance(source, Delta) else stack.enter_context(open_delta(source, limit=limit))
        there, scratch = base_of(delta, checkpoint), Path(out).absolute().parent
        read, is_small = delta, delta.needs_base or delta.packed
        if context == "base" and delta.needs_base:  # it is made anew, which needs its positions
            read = stack.enter_context(plain_delta(delta, there, passing=False))
        with replacing(Path(out)) as output:
            if context == "none" or (context is None and is_small):
                write_plain(read, there, output, progress, scratch=scratch, zstd=True)
                written = WrittenForm(needs_base=False, packed=False)
            else:
                written = write_on_base(read, there, output, progress, scratch=scratch)
            file_bytes = output.tell()
    return RecodeReport(
        source=delta.file or "delta",
        out=os.fspath(out),
        needs_base=written.needs_base,
        packed=written.packed,
        tensors=len(delta),
        nonzeros=delta.nnz,
        source_bytes=delta.sizes["file"],
        file_bytes=file_bytes,
        digest=delta.digest,
    )


def base_of(delta: Delta, checkpoint: Checkpoint, past: Past | None = None) -> Base:
    """The elements that a delta's tensors change.

    Args:
        delta: the delta.
        checkpoint: the model that has them.
        past: its tensors before some deltas on it, if those are meant.
    """
    wanted = {name: tensor.shape for name, tensor in delta.items() if tensor.operation.in_base}
    names, tensors = match_names(wanted, checkpoint).names, Past(dict(checkpoint)) if past is None else past

    def elements(record: Record) -> Array:
        # A tensor that a delta has dropped since is found under the file's name only.
        name = names.get(record.name, record.name)
        slot = tensors.slots.get(name)
        if slot is None or (slot.shape, slot.dtype) != (record.shape, record.dtype):
            found = "does not have it" if slot is None else f"has it as {slot.dtype.name} {list(slot.shape)}"
            raise FormatError("wrong_base", f"{checkpoint.root} {found}", tensor=record.name, file=delta.file)
        return tensors.view(name).every()

    return elements


def plain_on(journal: Journal | None, checkpoint: Checkpoint, delta: Delta, progress: Progress | None = None) -> Delta:
    """A delta in the form that needs no base to be read: a folder's weights tell, or those before some deltas on them.

    Args:
        journal: the folder's journal; None where it has none.
        checkpoint: the folder's weights.
        delta: the delta, which is read with its base only.
        progress: called with (tensor, done, total).

    Raises:
        FormatError: it was made for none of these, or is damaged.
    """
    entries = () if journal is None else journal.state.applied
    with ExitStack() as stack:
        past = Past(dict(checkpoint))
        for entry in reversed(entries):
            with suppress(FormatError):
                return plain_delta(delta, base_of(delta, checkpoint, past), progress)
            assert journal is not None
            past = past.before(journal, entry, stack)
        return plain_delta(delta, base_of(delta, checkpoint, past), progress)
