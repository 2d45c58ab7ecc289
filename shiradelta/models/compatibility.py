"""Whether a delta fits a model: shapes, dtypes, fingerprints, strengths and tied tensors.

Folders, live models and fused files share these checks; only the names in the messages differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format import arithmetic
from shiradelta.format.delta import TensorDelta
from shiradelta.format.digest import tensor_digest
from shiradelta.format.operations import Operation
from shiradelta.format.registry import ADDABLE, UNSPECIFIED
from shiradelta.models.safetensors import Slot


class Misfit(Enum):
    """Why a tensor's delta does not fit a tensor."""

    MISSING = auto()
    SHAPE = auto()
    DTYPE = auto()
    NOT_ADDABLE = auto()


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor.

    Attributes:
        shape: the tensor's shape.
        dtype: its dtype by torch's name; "unspecified" fits every dtype, "?" is unknown to the format.
    """

    shape: tuple[int, ...]
    dtype: str


def spec_of(tensor: TensorDelta | Slot) -> TensorSpec:
    """The spec of the tensor that a delta was made for, or of a stored tensor."""
    return TensorSpec(tensor.shape, tensor.dtype if isinstance(tensor, TensorDelta) else tensor.dtype.name)


def difference(one: TensorDelta | Slot, other: TensorDelta | Slot | TensorSpec | None) -> Misfit | None:
    """Whether two tensors differ in shape or dtype, or the other one is missing; None if they are alike."""
    if other is None:
        return Misfit.MISSING
    a, b = spec_of(one), other if isinstance(other, TensorSpec) else spec_of(other)
    if a.shape != b.shape:
        return Misfit.SHAPE
    return Misfit.DTYPE if a.dtype != b.dtype and UNSPECIFIED.name not in (a.dtype, b.dtype) else None


def misfit(tensor: TensorDelta, target: TensorSpec) -> Misfit | None:
    """Why a delta cannot be applied to a tensor; None if it can."""
    if target == (tensor.shape, tensor.dtype) and target.dtype in ADDABLE:  # nearly all are; the rest takes longer
        return None
    if tensor.operation.replaces:
        return None
    found = difference(tensor, target)
    exact = target.dtype in ADDABLE if tensor.operation.adds else target.dtype != "?"
    return Misfit.NOT_ADDABLE if found is not Misfit.SHAPE and not exact else found


def remedy_of(tensors: Iterable[TensorDelta]) -> str:
    """What to do with a delta whose names or shapes do not fit; without a base, its tensors have no dtype."""
    if {tensor.dtype for tensor in tensors if not tensor.operation.creates} == {UNSPECIFIED.name}:
        return (
            "it was made without a base, so its names and shapes were not compared with a model's: convert it again"
            " with --base"
        )
    return "give the model it was made for"


def check_fit(
    where: str,
    tensor: TensorDelta,
    target: TensorSpec,
    model: str,
    *,
    allow_dtype: bool,
    option: str,
    shown: str = "",
) -> None:
    """Checks that a delta can be applied to a tensor.

    Args:
        where: delta and tensor, for messages.
        tensor: the delta.
        target: the tensor.
        model: the model or folder that has the tensor, for messages.
        allow_dtype: take values that were made against another dtype.
        option: how a user sets `allow_dtype`.
        shown: the target's dtype in messages, where the format has no name for it.

    Raises:
        BaseMismatchError: the delta cannot be applied.
    """
    found = misfit(tensor, target)
    if found is None:
        return
    adds = tensor.operation.adds
    has = f"{where} has elements of {shown or target.dtype} in {model}"
    if found is Misfit.SHAPE:
        raise BaseMismatchError(
            f"{where} has shape {list(target.shape)} in {model}, the delta was made for {list(tensor.shape)};"
            f" {remedy_of([tensor])}"
        )
    if found is Misfit.NOT_ADDABLE:
        raise BaseMismatchError(
            f"{has}, to which nothing can be added exactly; apply it to the unquantised model and quantise the result,"
            " or convert a fine-tune that is stored as this base is"
        )
    if found is Misfit.DTYPE and not (allow_dtype and adds):
        hint = f"; {option} applies it all the same" if adds else ""
        raise BaseMismatchError(
            f"{has}, but the delta was made against a {tensor.dtype} base, so it cannot be checked{hint}"
        )


def check_tied(where: str, one: TensorDelta, other: TensorDelta, remedy: str) -> None:
    """Checks that the deltas of two names of one tensor are the same.

    Args:
        where: the second delta and its name, for messages.
        one: the delta under the first name.
        other: the delta under the second name.
        remedy: what to do if they differ.

    Raises:
        BaseMismatchError: they differ.
    """
    if one is not other and tensor_digest(one) != tensor_digest(other):
        raise BaseMismatchError(f"{where} is tied to another, and the delta changes the two differently; {remedy}")


def check_strength(where: str, strength: float, operations: Iterable[Operation], remedy: str = "leave it at 1") -> None:
    """Checks that operations allow the strength, if it is not 1.

    Raises:
        DeltaError: they do not, or the strength is not a finite float32.
    """
    arithmetic.alpha_of(strength)
    names = sorted({operation.name for operation in operations if not operation.has_strength})
    if strength != 1 and names:
        raise DeltaError(
            f"{where}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} strength 1 only; {remedy}"
        )


class Remedies(NamedTuple):
    """What a user can do if fingerprints differ.

    Attributes:
        result: the remedy if the tensor already holds the delta's result.
        other: the remedy for any other tensor.
    """

    result: str
    other: str


def check_fingerprint(where: str, found: int, base: int | None, result: int | None, remedies: Remedies) -> None:
    """Checks that a tensor is the one that a delta was made against (FORMAT.md, 6.3).

    Args:
        where: delta and tensor, for messages.
        found: the tensor's fingerprint at the delta's positions.
        base: the base's, from the file; None if it has none.
        result: the result's, likewise.
        remedies: what to do if they differ.

    Raises:
        BaseMismatchError: it is another tensor, or the result.
    """
    if base is None or found == base:
        return
    if found == result:
        raise BaseMismatchError(f"{where} already holds the result; {remedies.result}")
    raise BaseMismatchError(
        f"{where} is not the one that the delta was made against (fingerprint {found:016x} instead of {base:016x});"
        f" give the right base, or {remedies.other}"
    )
