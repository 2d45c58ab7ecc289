"""The step between two models: the elements whose bits differ, as they are afterwards, or how far they move."""

from __future__ import annotations

from pathlib import Path

from shiradelta.errors import FormatError
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.recode import base_of
from shiradelta.format import arithmetic, registry
from shiradelta.format.codecs import BITS, ULP
from shiradelta.format.delta import TensorDelta
from shiradelta.io.context import plain_delta, write_on_base
from shiradelta.io.reader import Delta
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.arrays import all_different, different
from shiradelta.util.progress import Progress


def write_difference(writer: DeltaWriter, before: Checkpoint, after: Checkpoint, progress: Progress | None) -> None:
    """Writes the delta that makes one model of another, exactly; one tensor is in memory at a time.

    Tensors that only one of them has are added or removed whole, those of another shape or dtype replaced.
    """
    names = sorted({*before, *after}, key=str.encode)
    for number, name in enumerate(names):
        if progress:
            progress(name, number, len(names))
        tensor = changed(name, before, after)
        if tensor is not None:
            writer.add(name, tensor if tensor.operation.restructures else shifted(tensor))


def changed(name: str, before: Checkpoint, after: Checkpoint) -> TensorDelta | None:
    """The change of one tensor, which sets its elements or restructures it; None if there is none."""
    if name not in before:
        new = after[name]
        return TensorDelta.trusted(new.shape, None, after.bits(name), new.dtype.name, "new", None)
    old, bits = before[name], before.bits(name)
    if name not in after:
        return TensorDelta(old.shape, None, None, old.dtype.name, "drop", base_fingerprint=PastBits(old).fingerprint())
    new, result = after[name], after.bits(name)
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return TensorDelta(
            new.shape, None, result, new.dtype.name, "replace", base_fingerprint=PastBits(old).fingerprint()
        )
    if bits.size and all_different(bits, result):
        return TensorDelta.trusted(old.shape, None, result, old.dtype.name, "set", bits)
    at = different(bits, result)
    if not at.size:
        return None
    return TensorDelta.trusted(old.shape, at, result[at], old.dtype.name, "set", bits[at])


def shifted(step: TensorDelta) -> TensorDelta:
    """A step that sets elements, as their shifts if those are smaller in a file."""
    assert step.base_bits is not None
    if step.dtype not in registry.ORDERED:
        return step
    shifts = arithmetic.shifts_between(step.base_bits, step.bits(), step.dtype)
    if shifts is None:
        return step
    bits = shifts.view(step.base_bits.dtype)
    # Where a file takes as much for either, shifts are smaller once it is packed.
    other = _room(BITS.size(step.nnz, bits.itemsize))
    if _room(ULP.encoded_size(bits, enough=other)) > other:
        return step
    positions = None if step.all_positions else step.positions()
    return TensorDelta.trusted(step.shape, positions, bits, step.dtype, "ulp", step.base_bits, draw=step.draw)


def _room(size: int) -> int:
    """What a section takes in a file."""
    return registry.align(size, registry.SECTION_ALIGNMENT)


def plain_step(step: Delta, before: Checkpoint | None) -> Delta:
    """The form that needs no base of a step that is read with the version before it only.

    Raises:
        FormatError: that version is not given or is another one, or the step is damaged.
    """
    if before is None:
        error = FormatError("base_needed", file=step.file)
        error.remedy = "give the model before it (--base)"
        raise error
    return plain_delta(step, base_of(step, before))


def smaller_form(path: Path, delta: Delta, base: Checkpoint, work: Path) -> Path:
    """The smaller one of a step's file and its form that is read with the model before it only."""
    other = work / "small.shd"
    with other.open("wb") as output:
        write_on_base(delta, base_of(delta, base), output)
    return min((path, other), key=lambda file: file.stat().st_size)
