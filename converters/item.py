"""What a source yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.delta import TensorDelta, check_shape
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.select.topk import Rows, row_shape


@dataclass(frozen=True)
class Item:
    """One tensor to convert: a dense delta of which the largest elements are kept, or something exact.

    Attributes:
        name: in the base's coordinates.
        shape, dtype: the base tensor's; dtype is "unspecified" where there is no base.
        dense: opens the dense delta (see `shiradelta.select.topk.Rows`), or None.
        exact: makes the tensor delta as it is to be stored, where nothing is to be selected.
        base_bits: maps the base's elements, flat, where there is a base.
        replacement: maps the fine-tune's elements, for a dtype to which nothing can be added: the selected are set.

    All of them are called when the tensor's turn comes, so that one tensor is in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dense: Callable[[], Rows] | None = None
    exact: Callable[[], TensorDelta] | None = None
    base_bits: Callable[[], Array] | None = None
    replacement: Callable[[], Array] | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return check_shape(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) in which `dense` makes it."""
        return row_shape(self.shape)

    def delta(self, positions: Positions, values: Float32) -> TensorDelta:
        """The tensor delta of selected elements."""
        base = None if self.base_bits is None else self.base_bits()[positions]
        if self.replacement is not None:
            return TensorDelta(self.shape, positions, self.replacement()[positions], self.dtype, "set", base_bits=base)
        return TensorDelta(self.shape, positions, values, self.dtype, base_bits=base)


@dataclass
class Source:
    """A source that was opened: what can be converted, what cannot and why, and what the user should know."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def whole_tensor(source: Checkpoint, key: str, name: str) -> Item:
    """A tensor that the base lacks: added whole."""
    slot = source[key]
    return Item(
        name,
        slot.shape,
        slot.dtype.name,
        exact=lambda: TensorDelta(slot.shape, None, source.bits(key), slot.dtype.name, "new"),
    )
