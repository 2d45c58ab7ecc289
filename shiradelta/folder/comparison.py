"""Compares a folder's weights with what the journal and the deltas say that they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import TargetError
from shiradelta.folder.digests import digest_of, model_files
from shiradelta.folder.journal import Journal
from shiradelta.folder.restructure import saved_files
from shiradelta.folder.state import Applied
from shiradelta.folder.weights import slots_of
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.windows import Cursor, windows_of
from shiradelta.io.reader import Delta
from shiradelta.models.checkpoint import Checkpoint, bits_of, open_checkpoint
from shiradelta.models.compatibility import difference
from shiradelta.models.library import match_names
from shiradelta.models.safetensors import Slot
from shiradelta.util.arrays import ranges
from shiradelta.util.directory import Directory


class PastBits:
    """A tensor's elements as they are, or were before some actions; read in windows of increasing positions.

    Args:
        slot: where the bits are.
        undos: the undo deltas of the actions, the last action's first; None for one that left the tensor alone.
    """

    def __init__(self, slot: Slot, undos: Iterable[TensorDelta | None] = ()) -> None:
        self._bits = bits_of(slot)
        self._undos = [Cursor(undo) for undo in undos if undo is not None and undo.nnz]

    def at(self, positions: Positions) -> Array:
        """The elements at some positions, which are behind those of the last call."""
        view: Array = self._bits[positions]
        for undo in self._undos:
            undo.overlay(positions, view)
        return view

    def every(self) -> Array:
        """All elements; nothing else may be read then."""
        return self.at(np.arange(self._bits.size)) if self._undos else self._bits

    def fingerprint(self, tensor: TensorDelta | None = None) -> int:
        """The fingerprint of the elements: all, or those that a delta compares; nothing else may be read then."""
        every = (np.arange(*span, dtype=np.int64) for span in ranges(self._bits.size))
        windows = every if tensor is None or tensor.operation.removes else tensor.position_windows()
        fingerprint = choose().fingerprint
        # A sum (FORMAT.md, 6.3).
        return sum(fingerprint(own, self.at(own)) for own in windows if own.size) % (1 << 64)

    def holds(self, tensor: TensorDelta) -> bool:
        """Whether they are what a delta sets, where it does; nothing else may be read then."""
        return all(np.array_equal(self.at(positions), bits) for positions, bits in windows_of(tensor))


class Past:
    """A folder's tensors as they are, or were before its last deltas.

    Attributes:
        slots: name -> where its bits are, before some undo deltas.
        undo: the undo delta of the last delta that was taken away; None in the present.
    """

    def __init__(
        self, slots: Mapping[str, Slot], undos: tuple[Delta, ...] = (), since: Mapping[str, int] | None = None
    ):
        self.slots = slots
        self._undos = undos
        self._since = since or {}

    @property
    def undo(self) -> Delta | None:
        """The undo delta that was applied last."""
        return self._undos[-1] if self._undos else None

    def before(self, journal: Journal, entry: Applied, stack: ExitStack) -> Past:
        """The tensors before the delta on top; files are closed with `stack`."""
        undos = (*self._undos, stack.enter_context(journal.open_undo(entry)))
        slots = {name: slot for name, slot in self.slots.items() if name not in entry.added}
        since = dict(self._since)
        originals = journal.originals(entry)
        if originals is not None:
            files = [file for file in saved_files(originals, entry.replaced) if file.endswith(".safetensors")]
            for name, slot in slots_of(originals.path, files).items():
                slots[name], since[name] = slot, len(undos)
        return Past(slots, undos, since)

    def view(self, name: str) -> PastBits:
        """A tensor's elements."""
        return PastBits(self.slots[name], (undo.get(name) for undo in self._undos[self._since.get(name, 0) :]))

    def fingerprint(self, name: str, tensor: TensorDelta | None = None) -> int:
        """The fingerprint of a tensor's elements, at a delta's positions or all."""
        return self.view(name).fingerprint(tensor)


def first_difference(checkpoint: Checkpoint, journal: Journal, entries: Sequence[Applied]) -> str | None:
    """The first tensor that differs from the state that the last applied deltas left; None if none differs."""
    with ExitStack() as stack:
        now = Past(dict(checkpoint))
        for entry in reversed(entries):
            for name, expected in entry.added.items():
                if name not in now.slots or now.fingerprint(name) != expected:
                    return f"tensor {name!r} is not as {entry.file} added it"
            before = now.before(journal, entry, stack)
            undo = before.undo
            if undo is None or not _accounts_for(undo, entry, now):
                return f"the undo delta of {entry.file} does not list the weights that it changes"
            for name, tensor in undo.items():
                if difference(tensor, now.slots.get(name)) is not None:
                    return f"tensor {name!r} is gone, or has another shape or dtype"
                if now.fingerprint(name, tensor) != tensor.base_fingerprint:
                    return f"tensor {name!r} is not as {entry.file} left it"
            now = before
    return None


def _accounts_for(undo: Delta, entry: Applied, now: Past) -> bool:
    """Whether an undo delta lists as many weights as its delta, where that is known.

    Tied tensors are listed once, and dropped ones not at all; then there are fewer tensors.
    """
    added = sum(now.slots[name].numel for name in entry.added)
    if len(undo) + len(entry.added) == entry.tensors:
        return undo.nnz + added == entry.nonzeros
    return len(undo) + len(entry.added) < entry.tensors and (len(undo) > 0 or entry.nonzeros == added)


def unlike_delta(checkpoint: Checkpoint, journal: Journal, delta: Delta, entry: Applied) -> str | None:
    """The first tensor that is not what a delta gives on the base that it was made for; None if there is none.

    The base's bits, for a successor those beneath it, must have the delta's own fingerprints, and what follows them
    must be its result.

    Args:
        checkpoint: the folder's weights.
        journal: the folder's journal.
        delta: the delta.
        entry: its entry in the journal.
    """
    with ExitStack() as stack:
        levels = {len(journal.state.applied): Past(dict(checkpoint))}
        for number, each in reversed(list(enumerate(journal.state.applied))):
            levels[number] = levels[number + 1].before(journal, each, stack)
        number = journal.state.applied.index(entry)
        base, before, after = levels[0], levels[number], levels[number + 1]
        changed = {
            name: tensor.shape
            for name, tensor in delta.items()
            if tensor.operation.in_base and tensor.operation.in_result
        }
        found = match_names(changed, checkpoint).names
        for name, tensor in delta.items():
            operation, own = tensor.operation, found.get(name, name)
            if not operation.in_result:
                if name in after.slots:
                    return f"tensor {name!r} is there, which {entry.file} removes"
                continue
            slot = after.slots.get(own)
            if slot is None or slot.shape != tensor.shape:
                return f"tensor {name!r} is gone, or has another shape"
            if operation.creates:
                if not after.view(own).holds(tensor):
                    return f"tensor {name!r} is not the one that {entry.file} adds"
                continue
            under = before if entry.successor else base
            known = tensor.base_fingerprint if tensor.dtype == slot.dtype.name and own in under.slots else None
            if known is not None and known != under.fingerprint(own, tensor):
                return f"tensor {name!r} was patched on another base than that of {entry.file}"
            if not _is_result(tensor, slot.dtype.name, entry.strength, before.view(own), after.view(own)):
                return f"tensor {name!r} is not what {entry.file} gives"
    return None


def _is_result(tensor: TensorDelta, dtype: str, strength: float, before: PastBits, after: PastBits) -> bool:
    """Whether a delta makes the elements of one view from those of the other."""
    operation = tensor.operation
    return all(
        np.array_equal(after.at(positions), arithmetic.result(operation, bits, before.at(positions), dtype, strength))
        for positions, bits in windows_of(tensor)
    )


def unlike_base(journal: Journal) -> str | None:
    """What differs from the base's files, once all deltas are taken out, by their recorded digests; None if nothing."""
    wanted, applied = journal.state.base, journal.state.applied
    files = set(model_files(open_checkpoint(journal.root, packed=True)))
    if files != set(wanted) and not any(entry.replaced for entry in applied):
        return f"{min(files ^ set(wanted))} is missing, or is not one of the base's weight files"
    with ExitStack() as stack:
        undos = {entry.id: stack.enter_context(journal.open_undo(entry)) for entry in applied}
        for file, digest in wanted.items():
            folder: Directory = journal.folder
            overlays: list[Delta] = []
            for entry in reversed(applied):
                if file in entry.replaced:
                    originals = journal.originals(entry)
                    if originals is None:
                        raise TargetError(f"{journal.undo_path(entry)}: its originals are missing; get the model again")
                    folder, overlays = originals, []
                elif file.endswith(".safetensors"):
                    overlays.append(undos[entry.id])
            try:
                if digest_of(folder, file, overlays) != digest:
                    return f"{file} is not the base's{', even without the deltas' if applied else ''} (SHA-256)"
            except FileNotFoundError:
                return f"{file} is missing"
    return None
