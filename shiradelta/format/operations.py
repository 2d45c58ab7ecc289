"""The operations, one row each: what a delta does to a tensor (spec/FORMAT.md, 6.1).

Code asks a row what the operation does (`tensor.operation.adds`, `.restructures`) and never compares names.
"""

from __future__ import annotations

from dataclasses import dataclass

from shiradelta.format.registry import ADDABLE, DTYPE_OF_NAME, ORDERED, UNSPECIFIED, Op
from shiradelta.util.registry import IdRegistry

_EVERY = frozenset(DTYPE_OF_NAME)
_KNOWN = _EVERY - {UNSPECIFIED.name}


@dataclass(frozen=True)
class Operation:
    """An operation: what a delta does to one tensor.

    Attributes:
        id: its number in a file.
        name: what `TensorDelta.op` calls it.
        adds: float32 values are added to elements.
        shifts: elements move by whole numbers of representable values: integers are added to their ordered bits.
        has_strength: a strength other than 1 is defined.
        creates: the file has a whole tensor, which is added to the model.
        removes: the base's tensor is taken away from the model.
        dtypes: names of the dtypes that it is defined for.
        minor: the minor version of the format that defines it.
    """

    id: int
    name: str
    adds: bool = False
    shifts: bool = False
    has_strength: bool = False
    creates: bool = False
    removes: bool = False
    dtypes: frozenset[str] = _KNOWN
    minor: int = 0

    @property
    def restructures(self) -> bool:
        """Whether the model gains or loses a tensor, or has one of another shape, which a live model cannot."""
        return self.creates or self.removes

    @property
    def in_base(self) -> bool:
        """Whether the base has a tensor of that name."""
        return self.removes or not self.creates

    @property
    def in_result(self) -> bool:
        """Whether the result has a tensor of that name; otherwise no nonzeros are listed."""
        return self.creates or not self.removes

    @property
    def replaces(self) -> bool:
        """Whether the base's tensor goes, whatever its shape and dtype, and another of its name comes."""
        return self.creates and self.removes

    @property
    def stores_elements(self) -> bool:
        """Whether new elements are listed as bits of the tensor's dtype."""
        return not self.adds and not self.shifts and self.in_result

    @property
    def needs_dtype(self) -> bool:
        """Whether the tensor's dtype has to be given."""
        return UNSPECIFIED.name not in self.dtypes

    @property
    def title(self) -> str:
        """The name in spec/REGISTRY.md."""
        return self.name.upper()


OPERATIONS: IdRegistry[Operation] = IdRegistry(
    "operation",
    (
        Operation(Op.ADD, "add", adds=True, has_strength=True, dtypes=ADDABLE),
        Operation(Op.SET, "set"),
        Operation(Op.ULP, "ulp", shifts=True, dtypes=frozenset(ORDERED), minor=1),
        Operation(Op.NEW, "new", creates=True),
        Operation(Op.DROP, "drop", removes=True, dtypes=_EVERY),
        Operation(Op.REPLACE, "replace", creates=True, removes=True, minor=1),
    ),
)
