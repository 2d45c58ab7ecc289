"""F32, F16, BF16 and BITS: values as they stand (FORMAT.md, section 5)."""

from __future__ import annotations

import numpy as np

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, from_float32, to_float32
from shiradelta.format.codecs.base import SLACK, Bytes, check_zero, padded, part


class Float:
    """F32, F16 or BF16: rounded to a float dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype = registry.DTYPE_OF_NAME[dtype]

    def size(self, nnz: int, size: int) -> int:
        """The elements, padded, and the slack."""
        return registry.align(nnz * self.dtype.size, 4) + registry.SLACK

    def encode(self, values: Array) -> bytes:
        """Raises DeltaError where a value is too large for the dtype."""
        bits = from_float32(values, self.dtype.name)
        if not np.all(np.isfinite(to_float32(bits, self.dtype.name))):
            raise DeltaError(f"a value of {np.abs(values).max():.4g} does not fit {self.dtype.name}; take f32 or bf16")
        return padded(bits.astype(self.dtype.bits).tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """Widened to float32."""
        return to_float32(part(data, start * self.dtype.size, stop - start, self.dtype.bits), self.dtype.name)

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Finite values, padding, slack."""
        if not np.all(np.isfinite(self.decode(data, nnz, size, 0, nnz))):
            raise FormatError("bad_value", "a value is not finite")
        check_zero(data, nnz * self.dtype.size)


class Bits:
    """BITS: elements of the tensor's own dtype."""

    def size(self, nnz: int, size: int) -> int:
        """The elements, padded, and the slack."""
        return registry.align(nnz * size, 4) + registry.SLACK

    def encode(self, values: Array) -> bytes:
        """The bytes of unsigned elements."""
        return padded(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """Unsigned elements."""
        return part(data, start * size, stop - start, f"<u{size}")

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Padding and slack."""
        check_zero(data, nnz * size)
