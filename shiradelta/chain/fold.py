"""Folds consecutive steps into one that gives the same bits as applying them in turn.

A step that sets elements says what they are afterwards, so the last one decides.  The fingerprint of the base at all
listed positions follows, too: a fingerprint is a sum over elements, and a step's own is taken over positions of which
those that an earlier step has set are known.  So neither the base nor a version in between is needed.

What steps that add or shift give follows from what was there.  So they need the base, where several steps have the
tensor: additions round at every step, and of shifts the sum is known, but not the base's fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.chain.difference import shifted
from shiradelta.chain.runs import Run, Runs
from shiradelta.chain.state import known
from shiradelta.errors import ChainError, FormatError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.draw import common_draw
from shiradelta.io.context import lacks_result
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.io.restored import restored
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot
from shiradelta.util.progress import Progress

_MODULUS = 1 << 64


def fold(
    steps: Sequence[Delta], writer: DeltaWriter, base: Checkpoint | None, progress: Progress | None = None
) -> None:
    """Writes one delta that gives the same bits as steps one after the other; one tensor is in memory at a time.

    Args:
        steps: the open files, in order; each was made for what the one before it gives.
        writer: where to write.
        base: the model that the first step is for; without it, only what is exact by itself is folded.
        progress: called with (tensor, done, total).

    Raises:
        ChainError: it cannot be done exactly, or the steps do not fit each other or the base.
        FormatError: a step is damaged.
        LimitError: a tensor takes more memory than a step's limit allows.
    """
    names = sorted({name for step in steps for name in step}, key=str.encode)
    for number, name in enumerate(names):
        if progress:
            progress(name, number, len(names))
        tensors = [(step.file or step.digest[:12], step[name]) for step in steps if name in step]
        folded = fold_tensor(name, tensors, None if base is None else base.get(name))
        if folded is not None:
            writer.add(name, folded)


def needs_base(steps: Sequence[Delta]) -> bool:
    """Whether `fold` of these steps needs the model that the first one is for."""
    for name in {name for step in steps for name in step}:
        if any(step[name].record.needs_base for step in steps if name in step):
            return True
        tensors = [step[name].operation for step in steps if name in step]
        follows = [operation for operation in tensors if operation.in_base and not operation.removes]
        first = tensors[0]
        if len(tensors) > 1 and first.in_base and not all(each.stores_elements for each in follows):
            return True
        if len(tensors) > 1 and first.replaces and not tensors[-1].in_result:
            return True
    return False


def fold_tensor(name: str, steps: Sequence[tuple[str, StoredTensor]], base: Slot | None) -> TensorDelta | None:
    """One tensor of a fold; None where nothing is left of it.

    Args:
        name: its name.
        steps: (label, delta) of the steps that have it, in order.
        base: the tensor before the first of them, if it is known.
    """
    (label, first), (_, last) = steps[0], steps[-1]
    if len(steps) == 1:
        where = f"{label}: tensor {name!r}"
        only = _readable(first, where, None if base is None else bits_of(base))
        if only.base_bits is not None:
            check_base(where, only, only.positions(), only.base_bits)
        return only
    runs = Runs(first.numel)
    replay = None if base is None else _Replay(bits_of(base))
    whole: StoredTensor | None = None  # the step that added the tensor, as it is now
    elements: Array = np.zeros(0, np.uint8)  # all of its elements, then
    removed = 0  # the fingerprint of all of the base's elements, after a step that removes the tensor
    for label, stored in steps:
        where, operation = f"{label}: tensor {name!r}", stored.operation
        now = elements if whole is not None else None if replay is None else replay.now
        step = _readable(stored, where, now)
        if operation.removes and whole is None:
            run = runs.all() if replay is None else replay.all()
            after = 0 if run is None else choose().fingerprint(run.positions, run.bits) - run.base
            removed = (known(step.base_fingerprint, label, name) - after) % _MODULUS
        if operation.creates:
            whole, elements = stored, step.bits().copy()
        elif operation.removes:
            whole = None
        elif whole is not None:
            _check_same(where, step, whole)
            positions = step.positions()
            old = elements[positions]
            check_base(where, step, positions, old)
            elements[positions] = arithmetic.result(operation, step.bits(), old, step.dtype, 1)
        else:
            _check_same(where, step, first)
            if replay is not None:
                replay.add(where, step)
            elif step.operation.stores_elements:
                runs.add(Run(step.positions(), step.bits(), known(step.base_fingerprint, label, name)))
            else:
                raise ChainError("needs_base", where, "what a step gives follows from what was there")
    if not first.operation.in_base:
        return None if whole is None else TensorDelta.trusted(whole.shape, None, elements, whole.dtype, "new", None)
    was = _form(first, base)
    if not last.operation.in_result:
        if was is None:
            raise ChainError("needs_base", f"tensor {name!r}", "a step replaces it, and another removes it")
        return TensorDelta(was[0], None, None, was[1], "drop", base_fingerprint=removed)
    if whole is not None:
        shape, dtype = whole.shape, whole.dtype
        if was == (shape, dtype):
            return TensorDelta.trusted(shape, np.arange(elements.size), elements, dtype, "set", None, removed)
        return TensorDelta.trusted(shape, None, elements, dtype, "replace", None, removed)
    run = runs.all() if replay is None else replay.all()
    if run is None or not run.positions.size:
        return None
    before = None if base is None else bits_of(base)[run.positions]
    draw = common_draw(step for _, step in steps)
    folded = TensorDelta.trusted(first.shape, run.positions, run.bits, first.dtype, "set", before, run.base, draw)
    return folded if before is None else shifted(folded)


def _form(first: StoredTensor, base: Slot | None) -> tuple[tuple[int, ...], str] | None:
    """The base's shape and dtype, as far as they are known."""
    if base is not None:
        return base.shape, base.dtype.name
    return None if first.operation.replaces else (first.shape, first.dtype)


class _Replay:
    """What steps give, one after the other, where the elements before the first are known.

    Args:
        base: all elements' bits before the first step.

    Attributes:
        now: all of them after the steps so far.
    """

    def __init__(self, base: Array) -> None:
        self._base, self.now = base, base.copy()
        self._touched = np.zeros(base.size, np.bool_)

    def add(self, where: str, step: TensorDelta) -> None:
        """Applies the next step."""
        if self._base.size != step.numel:
            raise ChainError("wrong_base", where, "the base has it in another shape")
        positions = step.positions()
        old = self.now[positions]
        check_base(where, step, positions, old)
        self.now[positions] = arithmetic.result(step.operation, step.bits(), old, step.dtype, 1)
        self._touched[positions] = True

    def all(self) -> Run:
        """What differs after the steps so far."""
        positions = np.flatnonzero(self._touched)
        positions = positions[self.now[positions] != self._base[positions]]
        return Run(positions, self.now[positions], choose().fingerprint(positions, self._base[positions]))


def check_base(where: str, step: TensorDelta, positions: Positions, bits: Array) -> None:
    """Checks that a step was made for these elements.

    Raises:
        ChainError: it was not.
    """
    if choose().fingerprint(positions, bits) != step.base_fingerprint:
        raise ChainError("wrong_base", where, "its fingerprint is that of other elements")


def _readable(step: StoredTensor, where: str, now: Array | None) -> TensorDelta:
    """A step that can be read and says what it gives, given all elements before it, where they are known.

    Raises:
        ChainError: it is read with them only, and they are not known, or are others.
    """
    if not step.record.needs_base and (now is None or not lacks_result(step.record)):
        return step
    if now is None:
        raise ChainError("needs_base", where, "it is read with the elements before it only")
    if now.size != step.numel:
        raise ChainError("wrong_base", where, "the base has it in another shape")
    try:
        return restored(step, now)
    except FormatError as error:
        if error.reason != "wrong_base":
            raise
        raise ChainError("wrong_base", where, error.detail) from None


def _check_same(where: str, step: TensorDelta, other: TensorDelta) -> None:
    if (step.shape, step.dtype) != (other.shape, other.dtype):
        raise ChainError("wrong_base", where, f"it is {step.dtype} {list(step.shape)}, and was of another form before")
