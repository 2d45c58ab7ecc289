"""Items of a source: tensors to convert, and tensors that are left out with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial

from shiradelta.folder.comparison import PastBits
from shiradelta.format.arithmetic import Array
from shiradelta.format.delta import TensorDelta, check_shape
from shiradelta.format.draw import Draw
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.io.recognise import UNQUANTISED
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.names import Shape
from shiradelta.models.safetensors import Slot
from shiradelta.select.topk import Rows, row_shape, top_k


@dataclass(frozen=True)
class Item:
    """One tensor to convert: a dense delta whose largest elements are kept, or an exact change.

    The callables run when the tensor's turn comes, so that one tensor is in memory at a time.

    Attributes:
        name: the tensor's name in the base.
        shape, dtype: the base tensor's; dtype is "unspecified" without a base.
        dense: opens the dense delta (see `shiradelta.select.topk.Rows`), or None.
        exact: makes the tensor delta to store where nothing is selected, or None.
        base_bits: maps the base's elements, flat; None without a base.
        tuned: maps the fine-tune's elements, flat; None if the source holds a change and not the result.
        tuned_dtype: their dtype, if it is not the base's.
        replaces: selected elements are set to the fine-tune's, in a dtype that nothing can be added to.
        draw: the draw that all elements of the dense delta that are not zero are of, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dense: Callable[[], Rows] | None = None
    exact: Callable[[], TensorDelta] | None = None
    base_bits: Callable[[], Array] | None = None
    tuned: Callable[[], Array] | None = None
    tuned_dtype: str | None = None
    replaces: bool = False
    draw: Draw | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return check_shape(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of what `dense` returns."""
        return row_shape(self.shape)


class SkipReason(Enum):
    """Why a source's tensor is not converted."""

    #: The base has no tensor of its name, or the name may mean several.
    NO_TARGET = auto()
    #: The base's tensor has another shape.
    SHAPE = auto()
    #: Nothing can be added exactly to the base's dtype.
    DTYPE = auto()
    #: Parts of it are missing, or do not fit together or the base's tensor.
    PARTS = auto()
    #: It takes a base to tell what it is, and none was given.
    NEEDS_BASE = auto()
    #: The same bits are converted under another name, or they are the tensor as it was before the fine-tune.
    DUPLICATE = auto()
    #: Another change to the same tensor is converted.
    CONFLICT = auto()
    #: It changes no weights by itself: an alpha without factors, or what only training uses.
    EMPTY = auto()
    #: A method or storage order that is not supported.
    UNSUPPORTED = auto()

    @property
    def loses(self) -> bool:
        """Whether a part of the fine-tune is missing from a file without the tensor."""
        return self not in (SkipReason.DUPLICATE, SkipReason.EMPTY)


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not converted.

    Attributes:
        reason: why.
        text: the reason for the report.
        energy: computes the squared norm of the change that is lost; None where it is unknown.
        names: what else the tensor is called, in the source and in the base, for patterns to match.
        whole: the item that puts the tensor in the place of the base's, for a user who asks for it; None if none does.
    """

    reason: SkipReason
    text: str
    energy: Callable[[], float] | None = None
    names: tuple[str, ...] = ()
    whole: Item | None = None

    def __str__(self) -> str:
        return self.text

    def called(self, *names: str | None) -> Skipped:
        """The same with further names."""
        return replace(self, names=(*self.names, *filter(None, names)))

    def of_change(self, rows: Callable[[], Rows], shape: tuple[int, ...]) -> Skipped:
        """The same, where the change that is lost is known: its rows and its shape."""
        return replace(self, energy=lambda: top_k(rows(), row_shape(shape), 0).energy)


def not_addable(name: str, slot: Slot) -> Skipped | None:
    """Why nothing can be added to a tensor of the base; None if it can."""
    if slot.dtype.name in ADD_DTYPES:
        return None
    why = f"the base stores {name!r} as {slot.dtype.name}, to which nothing can be added exactly; {UNQUANTISED}"
    return Skipped(SkipReason.DTYPE, why)


def other_shape(shape: Shape, name: str, slot: Slot) -> Skipped | None:
    """Why what is for a tensor of a shape cannot be for one of the base; None if it can."""
    if slot.shape == shape:
        return None
    why = f"it is for a tensor of shape {list(shape)}, the base's has {list(slot.shape)}"
    return Skipped(SkipReason.SHAPE, why, names=(name,))


#: The base lacks a tensor.
NO_TARGET = Skipped(SkipReason.NO_TARGET, "the base has no such tensor")
#: The base has it, but stacked, split or transposed.
CONVERTED = Skipped(SkipReason.UNSUPPORTED, "the base stores it in another form, as other tensors; merge it first")


@dataclass
class Source:
    """An opened source: what is converted, what is not and why, and warnings for the user."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, found: Item | Skipped) -> None:
        """Files what became of the source's tensor `name`."""
        if isinstance(found, Item):
            self.items.append(found)
        else:
            self.skipped[name] = found


def replacing_tensor(source: Checkpoint, key: str, base: Checkpoint, name: str) -> Item:
    """A tensor that takes the place of the base's, which has another shape: the file holds it whole."""
    slot = source[key]

    def exact() -> TensorDelta:
        known = PastBits(base[name]).fingerprint()
        return TensorDelta(slot.shape, None, source.bits(key), slot.dtype.name, "replace", base_fingerprint=known)

    return Item(name, slot.shape, slot.dtype.name, exact=exact, tuned=partial(source.bits, key))


def whole_tensor(source: Checkpoint, key: str, name: str) -> Item:
    """A tensor that the base lacks: the file holds it whole."""
    slot = source[key]
    return Item(
        name,
        slot.shape,
        slot.dtype.name,
        exact=lambda: TensorDelta(slot.shape, None, source.bits(key), slot.dtype.name, "new"),
        tuned=partial(source.bits, key),
    )
