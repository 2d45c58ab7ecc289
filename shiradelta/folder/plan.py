"""What a delta would do to a base: which tensors, whether they fit, and the new elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format import registry
from shiradelta.format.digest import tensor_digest
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.checkpoint import Checkpoint, Slot, match_names


@dataclass(frozen=True)
class Edit:
    """One tensor delta and the tensor of the base that it changes."""

    tensor: StoredTensor
    slot: Slot
    name: str  # in the checkpoint: a slot's own name lacks the component


@dataclass(frozen=True)
class Plan:
    """All that a delta does to a base."""

    edits: tuple[Edit, ...]
    new: tuple[tuple[str, StoredTensor], ...]
    drop: tuple[Edit, ...]

    @property
    def restructures(self) -> bool:
        """Whether tensors are added or taken away."""
        return bool(self.new or self.drop)


def make_plan(checkpoint: Checkpoint, delta: Delta, strength: float, allow_dtype: bool) -> Plan:
    """Matches every tensor of the delta with the base, and checks names, shapes, dtypes and strength.

    Raises:
        BaseMismatchError: the delta does not fit this base.
        DeltaError: the strength is not allowed.
    """
    tensors = dict(delta.items())
    if strength != 1 and any(tensor.op != "add" for tensor in tensors.values()):
        raise DeltaError(f"{_label(delta)} sets whole values, which have no strength; leave --strength at 1")
    new = {name: tensor for name, tensor in tensors.items() if tensor.op == "new"}
    wanted = {name: tensor.shape for name, tensor in tensors.items() if name not in new}
    found = match_names(wanted, checkpoint)
    missing = [name for name in wanted if name not in found]
    if missing:
        some = "none" if not found else f"only {len(found)}"
        raise BaseMismatchError(
            f"{_label(delta)}: {some} of its {len(wanted)} tensors are in {checkpoint.root}, the first missing is"
            f" {missing[0]!r} (the base has e.g. {next(iter(checkpoint), 'nothing')!r}); give the model it was made for"
        )
    for name in new:
        if name in checkpoint:
            raise BaseMismatchError(f"{_label(delta)} adds tensor {name!r}, which {checkpoint.root} already has")
    edits = [Edit(tensors[name], checkpoint[other], other) for name, other in found.items()]
    for edit in edits:
        _check_fit(edit, checkpoint, delta, allow_dtype)
    return Plan(
        tuple(_unique(edit for edit in edits if edit.tensor.op != "drop")),
        tuple(new.items()),
        tuple(edit for edit in edits if edit.tensor.op == "drop"),
    )


def _label(delta: Delta) -> str:
    return delta.file or f"delta {delta.digest[:12]}"


def _check_fit(edit: Edit, checkpoint: Checkpoint, delta: Delta, allow_dtype: bool) -> None:
    tensor, slot = edit.tensor, edit.slot
    where = f"{_label(delta)}: tensor {edit.name!r}"
    if tensor.shape != slot.shape:
        raise BaseMismatchError(
            f"{where} has shape {list(slot.shape)} in {checkpoint.root}, the delta was made for {list(tensor.shape)};"
            " give the model it was made for"
        )
    addable = slot.dtype.name in registry.ADDABLE
    if tensor.op == "add" and not addable:
        raise BaseMismatchError(
            f"{where} is stored as {slot.dtype.name} in {checkpoint.root}, to which nothing can be added exactly;"
            " convert the fine-tune against this base, which stores whole values"
        )
    if tensor.dtype in (slot.dtype.name, "unspecified"):
        return
    if not (allow_dtype and tensor.op == "add" and addable):
        hint = "; --allow-dtype applies it all the same" if tensor.op == "add" and addable else ""
        raise BaseMismatchError(
            f"{where} is stored as {slot.dtype.name} in {checkpoint.root}, but the delta was made against a"
            f" {tensor.dtype} base, so it cannot be checked{hint}"
        )


def _unique(edits: Iterable[Edit]) -> list[Edit]:
    """Edits of tied tensors that are one tensor on disk are written once; they must agree."""
    kept: dict[str, Edit] = {}
    for edit in edits:
        other = kept.setdefault(edit.name, edit)
        if other is not edit and tensor_digest(other.tensor) != tensor_digest(edit.tensor):
            raise BaseMismatchError(
                f"tensor {edit.name!r} is tied to another, and the delta changes the two differently; untie the"
                " base before applying"
            )
    return list(kept.values())
