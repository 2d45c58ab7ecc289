"""Plans what a delta changes in a model's folder, and checks that it fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shiradelta.errors import BaseMismatchError
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.compatibility import check_fit, check_strength, check_tied, remedy_of, spec_of
from shiradelta.models.library import match_names
from shiradelta.models.safetensors import Slot
from shiradelta.util.text import count


@dataclass(frozen=True)
class Edit:
    """A tensor's delta and the tensor of the base that it changes.

    Attributes:
        tensor: the delta.
        slot: the file and offset of the base's tensor.
        name: the name in the checkpoint; the slot's own name lacks the component.
    """

    tensor: StoredTensor
    slot: Slot
    name: str


@dataclass(frozen=True)
class FolderPlan:
    """All changes that a delta makes to a folder.

    Attributes:
        edits: the tensors whose elements change.
        new: (name, tensor) of the tensors to add.
        drop: the tensors to remove. One that is replaced is here and in `new`.
    """

    edits: tuple[Edit, ...]
    new: tuple[tuple[str, StoredTensor], ...]
    drop: tuple[Edit, ...]

    @property
    def restructures(self) -> bool:
        """Whether tensors are added or removed."""
        return bool(self.new or self.drop)


def make_plan(checkpoint: Checkpoint, delta: Delta, strength: float, allow_dtype: bool) -> FolderPlan:
    """Finds every tensor of the delta in the base, and checks names, shapes, dtypes and the strength.

    Raises:
        BaseMismatchError: the delta does not fit this base.
        DeltaError: the delta cannot have this strength.
    """
    tensors = dict(delta.items())
    operations = (tensor.operation for tensor in tensors.values())
    check_strength(_label(delta), strength, operations, "leave --strength at 1")
    new = {name: tensor for name, tensor in tensors.items() if not tensor.operation.in_base}
    wanted = {
        name: None if tensor.operation.replaces else tensor.shape for name, tensor in tensors.items() if name not in new
    }
    matched = match_names(wanted, checkpoint)
    found = matched.names
    missing = [name for name in wanted if name not in found]
    if matched.unclear:
        name, why = next(iter(matched.unclear.items()))
        raise BaseMismatchError(
            f"{_label(delta)}: {why} of {checkpoint.root}; rename {name!r} in the source, and convert it again"
        )
    if missing:
        raise BaseMismatchError(
            f"{_label(delta)}: {len(found)} of {count(wanted, 'tensor')} found in {checkpoint.root}, the first missing"
            f" is {missing[0]!r} (the base has e.g. {next(iter(checkpoint), 'nothing')!r});"
            f" {remedy_of(tensors.values())}"
        )
    for name in new:
        if name in checkpoint:
            raise BaseMismatchError(f"{_label(delta)} adds tensor {name!r}, which {checkpoint.root} already has")
    edits = [Edit(tensors[name], checkpoint[other], other) for name, other in found.items()]
    for edit in edits:
        check_fit(
            f"{_label(delta)}: tensor {edit.name!r}",
            edit.tensor,
            spec_of(edit.slot),
            str(checkpoint.root),
            allow_dtype=allow_dtype,
            option="--allow-dtype",
        )
    unique = _unique(edits)
    replaced = [(edit.name, edit.tensor) for edit in unique if edit.tensor.operation.replaces]
    return FolderPlan(
        edits=tuple(edit for edit in unique if not edit.tensor.operation.removes),
        new=(*new.items(), *replaced),
        drop=tuple(edit for edit in unique if edit.tensor.operation.removes),
    )


def _label(delta: Delta) -> str:
    return delta.file or f"delta {delta.digest[:12]}"


def _unique(edits: Iterable[Edit]) -> list[Edit]:
    """One edit per tensor on disk; edits of tied tensors must agree."""
    kept: dict[str, Edit] = {}
    for edit in edits:
        first = kept.setdefault(edit.name, edit)
        check_tied(f"tensor {edit.name!r}", first.tensor, edit.tensor, "untie the base before applying")
    return list(kept.values())
