"""Folds consecutive steps into one that gives the same bits as applying them in turn.

A step that sets elements says what they are afterwards, so the last one decides.  The fingerprint of the base at all
listed positions follows, too: a fingerprint is a sum over elements, and a step's own is taken over positions of which
those that an earlier step has set are known.  So neither the base nor a version in between is needed.

Additions round at every step to what the weights are then.  They are exact only with the base, which turns each of them
into the elements that it gives, or where one step alone has the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.chain.state import known
from shiradelta.errors import ChainError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.checkpoint import Checkpoint, bits_of
from shiradelta.models.safetensors import Slot
from shiradelta.util.arrays import merge_sorted, overlay_values
from shiradelta.util.progress import Progress

_MODULUS = 1 << 64


class Run(NamedTuple):
    """Elements that some consecutive steps have set.

    Attributes:
        positions: sorted.
        bits: the elements afterwards.
        base: the fingerprint of what was at the positions before.
    """

    positions: Positions
    bits: Array
    base: int


def merged(runs: Sequence[Run]) -> Run:
    """One run for several, the earliest first."""
    if len(runs) == 1:
        return runs[0]
    union = merge_sorted([run.positions for run in runs])
    bits = np.empty(union.union.size, runs[0].bits.dtype)
    known = np.zeros(union.union.size, np.bool_)
    base, fingerprint = 0, choose().fingerprint
    for run, at in zip(runs, union.indices, strict=True):
        again = known[at]
        base += run.base - fingerprint(run.positions[again], bits[at[again]])
        bits[at], known[at] = run.bits, True
    return Run(union.union, bits, base % _MODULUS)


class Runs:
    """Consecutive runs, merged now and then: each element is copied a few times, whatever the number of runs.

    Runs wait until they have as many elements as what is merged already, so memory is that of a few tensors.
    """

    def __init__(self) -> None:
        self._merged: Run | None = None
        self._waiting: list[Run] = []
        self._size = 0

    def add(self, run: Run) -> None:
        """Adds the next run."""
        self._waiting.append(run)
        self._size += run.positions.size
        if self._merged is None or self._size > 2 * self._merged.positions.size:
            self.all()

    def all(self) -> Run | None:
        """One run for all so far; None if there was none."""
        if self._waiting:
            self._merged = merged([*self._earlier(), *self._waiting])
            self._waiting, self._size = [], 0
        return self._merged

    def _earlier(self) -> list[Run]:
        return [] if self._merged is None else [self._merged]


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


def fold_tensor(name: str, steps: Sequence[tuple[str, StoredTensor]], base: Slot | None) -> TensorDelta | None:
    """One tensor of a fold; None where nothing is left of it.

    Args:
        name: its name.
        steps: (label, delta) of the steps that have it, in order.
        base: the tensor before the first of them, if it is known.
    """
    (_, first), (label, last) = steps[0], steps[-1]
    if len(steps) == 1:
        return first
    runs = Runs()
    whole: StoredTensor | None = None  # the step that added the tensor, as it is now
    elements = np.zeros(0, np.uint8)  # all of its elements, then
    removed = 0  # the fingerprint of all of the base's elements, after a step that removes the tensor
    for label, step in steps:
        where, operation = f"{label}: tensor {name!r}", step.operation
        if operation.removes and whole is None:
            run = runs.all()
            after = 0 if run is None else choose().fingerprint(run.positions, run.bits) - run.base
            removed = (known(step.base_fingerprint, label, name) - after) % _MODULUS
        if operation.creates:
            whole, elements = step, step.bits().copy()
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
            runs.add(_run(label, name, step, None if base is None else bits_of(base), runs))
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
    run = runs.all()
    assert run is not None
    return TensorDelta.trusted(first.shape, run.positions, run.bits, first.dtype, "set", None, run.base)


def _form(first: StoredTensor, base: Slot | None) -> tuple[tuple[int, ...], str] | None:
    """The base's shape and dtype, as far as they are known."""
    if base is not None:
        return base.shape, base.dtype.name
    return None if first.operation.replaces else (first.shape, first.dtype)


def _run(label: str, name: str, step: StoredTensor, base: Array | None, runs: Runs) -> Run:
    """What a step sets; of one that adds or shifts, what it gives."""
    where, positions = f"{label}: tensor {name!r}", step.positions()
    fingerprint = known(step.base_fingerprint, label, name)
    if step.operation.stores_elements:
        return Run(positions, step.bits(), fingerprint)
    if base is None:
        raise ChainError("needs_base", where, "what a step gives follows from what was there")
    if base.size != step.numel:
        raise ChainError("wrong_base", where, "the base has it in another shape")
    old, before = base[positions], runs.all()
    if before is not None:
        old = overlay_values(np, old, positions, before.positions, before.bits)
    check_base(where, step, positions, old)
    return Run(positions, arithmetic.result(step.operation, step.bits(), old, step.dtype, 1), fingerprint)


def check_base(where: str, step: TensorDelta, positions: Positions, bits: Array) -> None:
    """Checks that a step was made for these elements.

    Raises:
        ChainError: it was not.
    """
    if choose().fingerprint(positions, bits) != step.base_fingerprint:
        raise ChainError("wrong_base", where, "its fingerprint is that of other elements")


def _check_same(where: str, step: StoredTensor, other: StoredTensor) -> None:
    if (step.shape, step.dtype) != (other.shape, other.dtype):
        raise ChainError("wrong_base", where, f"it is {step.dtype} {list(step.shape)}, and was of another form before")
