"""`TensorDelta`, the change of one tensor in memory, which the whole package works with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Float32, Positions, to_float32
from shiradelta.format.draw import Draw
from shiradelta.format.operations import OPERATIONS, Operation
from shiradelta.util.arguments import ARRAY, SHAPE, TEXT, WHOLE, ArgumentKind, checked
from shiradelta.util.arrays import ranges
from shiradelta.util.optional import importing

if TYPE_CHECKING:
    from scipy.sparse import coo_array
    from torch import Tensor


def check_shape(shape: tuple[int, ...]) -> int:
    """The number of elements of `shape`; raises DeltaError where the format cannot hold it."""
    if len(shape) > registry.MAX_RANK:
        raise DeltaError(f"shape {shape} has more than {registry.MAX_RANK} dimensions")
    numel = math.prod(shape)
    if any(not 0 <= size <= registry.MAX_NUMEL for size in shape) or numel > registry.MAX_NUMEL:
        raise DeltaError(f"shape {shape} is out of range: at most 2^56 elements")
    return numel


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: the first dimension by all others (FORMAT.md, 4.5)."""
    if not shape:
        return 1, 1
    if len(shape) == 1:
        return 1, shape[0]
    return shape[0], math.prod(shape[1:])


POSITIONS = ArgumentKind("an array of whole numbers, or None", lambda value: value is None or ARRAY.holds(value))
DRAW = ArgumentKind(
    "a Draw of a seed from 0 to 2^64 - 1 and a number of cells",
    lambda value: (
        isinstance(value, Draw) and WHOLE.holds(value.seed) and WHOLE.holds(value.cells) and 0 <= value.seed < 1 << 64
    ),
)
VALUES = ArgumentKind("an array of numbers; None for op='drop'", lambda value: value is None or ARRAY.holds(value))


class TensorDelta:
    """A sparse change of one tensor; immutable.

    Args:
        shape: the base tensor's shape, at most 8 dimensions; that of the new tensor for `new` and `replace`.
        positions: flat row-major int64 indices, strictly increasing, each below the number of elements;
            None for all of them, in order.
        values: one per position.  For `add`: finite, taken as float32.  For `set`, `new` and `replace`: the
            new elements, as an array of the dtype's own size (bfloat16 and fp8 as unsigned integers).  For `ulp`: whole
            numbers other than 0, by how many representable numbers elements move.  None for `drop`.
        dtype: the base tensor's, by torch's name ("bfloat16").  "unspecified" fits a tensor of any dtype that `add` is
            defined for, and only `add` and `drop` do without a dtype.
        op: "add", "set", "ulp" (elements move along the numbers of their dtype), "new" (the whole tensor is added to
            the model), "drop" (taken away) or "replace" (the base's is taken away, and this one, of any shape and
            dtype, is added under its name).
        base_bits: the base's elements at the positions, as bits: with it, a file gets fingerprints.
        base_fingerprint: the base's fingerprint there, if only that is known.
        draw: the draw that all positions are of, if they were drawn from a seed: with it, a file is smaller.  Writing
            one compares them.

    Raises:
        DeltaError: the arguments break these rules.
    """

    @checked(
        shape=SHAPE,
        positions=POSITIONS,
        values=VALUES,
        dtype=TEXT,
        op=TEXT,
        base_bits=ARRAY,
        base_fingerprint=WHOLE,
        draw=DRAW,
    )
    def __init__(
        self,
        shape: tuple[int, ...],
        positions: npt.ArrayLike | None,
        values: npt.ArrayLike | None,
        dtype: str = "unspecified",
        op: str = "add",
        base_bits: Array | None = None,
        base_fingerprint: int | None = None,
        draw: Draw | None = None,
    ) -> None:
        self._shape = tuple(int(size) for size in shape)
        numel = check_shape(self._shape)
        operation = OPERATIONS.find(op)
        if dtype not in registry.DTYPE_OF_NAME:
            raise ArgumentError(f"dtype {dtype!r} is unknown; it is one of {', '.join(registry.DTYPE_OF_NAME)}")
        if dtype not in operation.dtypes:
            if dtype == "unspecified":
                raise DeltaError(f"{op} is of elements as they are: give their dtype, such as dtype='bfloat16'")
            if operation.shifts:
                raise DeltaError(f"{op} is not defined for {dtype}, whose elements have no order; use set")
            raise DeltaError(f"{op} is not defined for {dtype}, whose sums are not exact in float32; use set")
        self._dtype, self._operation = dtype, operation
        if operation.creates and positions is not None:
            raise DeltaError(f"{op} adds a whole tensor: give None for its positions")
        if not operation.in_result:
            positions, values = [], np.zeros(0, np.float32)
        elif values is None:
            raise ArgumentError(f"TensorDelta: values is None; give {VALUES.what}")
        self._positions = None if positions is None else _checked_positions(positions, numel)
        count = numel if self._positions is None else self._positions.size
        self._values = _checked_values(values, count, dtype, operation)
        if dtype == "unspecified" and (base_bits is not None or base_fingerprint is not None):
            raise DeltaError("what is known of the base needs its dtype: give it, such as dtype='bfloat16'")
        if base_bits is not None and operation.replaces:
            raise DeltaError(
                f"{op} has a base of another shape: give base_fingerprint, which is that of all its elements"
            )
        if base_bits is not None and base_bits.shape != (count,):
            raise DeltaError(f"{base_bits.size} base elements for {count} positions")
        self.base_bits = base_bits
        self._base_fingerprint, self._draw = base_fingerprint, draw

    @classmethod
    def trusted(
        cls,
        shape: tuple[int, ...],
        positions: Positions | None,
        values: Array,
        dtype: str,
        op: str,
        base_bits: Array | None,
        base_fingerprint: int | None = None,
        draw: Draw | None = None,
    ) -> TensorDelta:
        """Makes a delta without checks, and without copies, of arrays that keep the rules and that nobody changes."""
        made = cls.__new__(cls)
        made._shape, made._positions, made._values, made._dtype = shape, positions, values, dtype
        made._operation, made.base_bits, made._base_fingerprint = OPERATIONS[op], base_bits, base_fingerprint
        made._draw = draw
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """The base tensor's shape."""
        return self._shape

    @property
    def dtype(self) -> str:
        """The base tensor's dtype, by torch's name, or "unspecified"."""
        return self._dtype

    @property
    def op(self) -> str:
        """The operation's name, such as "add"; see `OPERATIONS`."""
        return self._operation.name

    @property
    def operation(self) -> Operation:
        """The operation's row in `OPERATIONS`."""
        return self._operation

    @property
    def numel(self) -> int:
        """Elements of the base tensor."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of listed positions, explicit zeros included."""
        return self._values.size

    @property
    def all_positions(self) -> bool:
        """Whether every element is listed."""
        return self.nnz == self.numel and self._operation.in_result

    @property
    def base_fingerprint(self) -> int | None:
        """The base's fingerprint at the positions (FORMAT.md, 6.3); None if unknown."""
        return self._base_fingerprint

    @property
    def result_fingerprint(self) -> int | None:
        """The fingerprint of the result at strength 1; None if unknown."""
        return None

    @property
    def draw(self) -> Draw | None:
        """The draw that all positions are of; None where none is known."""
        return self._draw

    def positions(self) -> Positions:
        """int64 [nnz], strictly increasing, flat row-major."""
        if self._positions is None:
            return np.arange(self.numel, dtype=np.int64)
        return self._positions

    def bits(self) -> Array:
        """Unsigned [nnz]: new elements' bits for set and new, bits of binary32 values for add, of shifts for ulp.

        A shift is an integer of the elements' size, in two's complement.
        """
        lists_floats = self._operation.adds or not self._operation.in_result
        return self._values.view(np.uint32) if lists_floats else self._values

    def position_windows(self) -> Iterator[Positions]:
        """What `positions` gives, in runs of at most `WINDOW`: little memory, whatever the tensor's size.

        Those of a file are checked in full only when the last run was taken.
        """
        for start, stop in ranges(self.nnz):
            yield np.arange(start, stop, dtype=np.int64) if self._positions is None else self._positions[start:stop]

    def bits_windows(self) -> Iterator[Array]:
        """What `bits` gives, in runs of at most `WINDOW`, as `position_windows`."""
        bits = self.bits()
        for start, stop in ranges(bits.size):
            yield bits[start:stop]

    def values(self) -> Float32:
        """float32 [nnz]: the added values, or new elements if float32 holds them exactly.

        Raises:
            DeltaError: float32 does not hold them, or the delta has none, as with ulp.
        """
        bits = self.bits()
        if self._operation.shifts:
            raise DeltaError(f"{self.op} has no values; read its bits() instead")
        return to_float32(bits, self.dtype) if self._operation.stores_elements else bits.view(np.float32)

    def payload(self) -> Array:
        """What `TensorDelta` takes as values: float32 for add, shifts for ulp, else elements' bits; [nnz]."""
        if self._operation.adds:
            return self.values()
        bits = self.bits()
        return bits.view(f"<i{bits.itemsize}") if self._operation.shifts else bits

    def check_memory(self, size: int) -> None:
        """Checks, before anything is allocated, that making `size` bytes of the delta is allowed; here it always is."""

    def to_scipy(self) -> coo_array:
        """A scipy.sparse.coo_array of `shape` ((1,) for a scalar), float32."""
        from scipy.sparse import coo_array

        shape = self.shape or (1,)
        return coo_array((self.values(), np.unravel_index(self.positions(), shape)), shape=shape)

    def to_torch_sparse(self) -> Tensor:
        """A coalesced torch.sparse COO tensor of `shape`, float32, on the CPU.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        with importing("a sparse tensor of torch"):
            import torch

        indices = (
            np.stack(np.unravel_index(self.positions(), self.shape)) if self.shape else np.zeros((0, self.nnz), int)
        )
        return torch.sparse_coo_tensor(
            torch.from_numpy(indices.astype(np.int64, copy=False)),
            torch.from_numpy(self.values().copy()),
            self.shape,
            is_coalesced=True,
            check_invariants=False,
        )

    def to_dense(self) -> Float32:
        """float32 array of `shape`, zero where nothing is listed."""
        dense = np.zeros(self.numel, np.float32)
        dense[self.positions()] = self.values()
        return dense.reshape(self.shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"<TensorDelta {self.op} {shape} {self.dtype}, {self.nnz:,} of {self.numel:,}>"


def _checked_positions(positions: npt.ArrayLike, numel: int) -> Positions:
    array = np.asarray(positions)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DeltaError(f"positions are {array.dtype} {list(array.shape)}; they must be integers in one dimension")
    result = np.array(array, dtype=np.int64)
    if result.size and (np.any(result[1:] <= result[:-1]) or result[0] < 0):
        raise DeltaError("positions are not strictly increasing from 0 upwards; sort them and drop repeats")
    if result.size and result[-1] >= numel:
        raise DeltaError(f"position {result[-1]} is outside a tensor of {numel} elements")
    result.setflags(write=False)
    return result


def _checked_values(values: npt.ArrayLike, count: int, dtype: str, operation: Operation) -> Array:
    if operation.shifts:
        result = _checked_shifts(values, registry.DTYPE_OF_NAME[dtype])
    elif operation.stores_elements:
        size = registry.DTYPE_OF_NAME[dtype].size
        result = np.array(values).reshape(-1)
        if result.itemsize != size:
            raise DeltaError(
                f"{operation.name} stores the bits of {dtype}: give {size} bytes per element, not {result.dtype}"
            )
        result = result.astype(result.dtype.newbyteorder("<"), copy=False).view(f"<u{size}")
    else:
        with np.errstate(over="ignore"):
            result = np.array(values, dtype=np.float32).reshape(-1)
        if not np.all(np.isfinite(result)):
            first = int(np.flatnonzero(~np.isfinite(result))[0])
            raise DeltaError(f"value {first} is {result[first]}; NaN and infinity cannot be added")
    if result.size != count:
        raise DeltaError(f"{result.size} values for {count} positions")
    result.setflags(write=False)
    return result


def _checked_shifts(values: npt.ArrayLike, dtype: registry.DType) -> Array:
    """Shifts as bits of the elements' size."""
    array = np.array(values).reshape(-1)
    if array.size and array.dtype.kind not in "iu":
        raise DeltaError(f"shifts are {array.dtype}; they must be whole numbers")
    most = (1 << (8 * dtype.size - 1)) - 1
    if array.size and (int(array.min()) < -most or int(array.max()) > most or not array.all()):
        raise DeltaError(f"a shift is 0, or beyond {most}, the most for {dtype.name}; leave it out, or use set")
    return array.astype(f"<i{dtype.size}").view(dtype.bits)
