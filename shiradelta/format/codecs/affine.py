"""I8, I4 and SIGN: codes in groups of 128 with bf16 parameters (FORMAT.md, sections 5 and 8).

The largest of a tensor's changes have a hole around zero, on which codes that are symmetric around zero
waste half of their range; hence I4 and SIGN store a sign and an affine magnitude.
"""

from __future__ import annotations

import numpy as np

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array, Float32, bfloat16_bits, from_bfloat16
from shiradelta.format.codecs.base import SLACK, Bytes, check_zero, padded, part
from shiradelta.format.codecs.bits import pack_bitmap

GROUP = registry.GROUP


def _grouped(values: Float32, fill: float) -> Float32:
    """[groups, 128], the last group filled up."""
    groups = -(-values.size // GROUP)
    result = np.full(groups * GROUP, fill, np.float32)
    result[: values.size] = values
    return result.reshape(groups, GROUP)


def _parameter(values: Float32) -> tuple[Array, Float32]:
    """(bf16 bits, the same as float32 in a column)."""
    bits = bfloat16_bits(values)
    return bits, from_bfloat16(bits)[:, None]


def _check_parameters(bits: Array, largest: Float32) -> None:
    """Signs are clear and the largest magnitude that the parameters allow is finite."""
    if np.any(bits >> 15) or not np.all(np.isfinite(largest)):
        raise FormatError("bad_value", "a group's parameter is negative or too large")


def _fits(*parameters: Float32, largest: Float32) -> None:
    if not all(np.all(np.isfinite(p)) for p in parameters) or not np.all(np.isfinite(largest)):
        raise DeltaError("values this large do not fit the codec; take f32 or bf16")


class Int8:
    """I8: fl32(scale q)."""

    def size(self, nnz: int, size: int) -> int:
        """Scales, codes, slack."""
        return self._codes(nnz) + registry.align(nnz, 4) + registry.SLACK

    @staticmethod
    def _codes(nnz: int) -> int:
        return registry.align(-(-nnz // GROUP) * 2, 4)

    def encode(self, values: Array) -> bytes:
        """Scale by the largest of each group."""
        grouped = _grouped(values, 0)
        bits, scale = _parameter(np.abs(grouped).max(axis=1) / np.float32(127))
        with np.errstate(over="ignore"):
            _fits(scale, largest=scale * np.float32(128))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.where(scale > 0, np.clip(np.rint(grouped / scale), -127, 127), 0)
        codes = codes.reshape(-1)[: values.size].astype(np.int8)
        return padded(bits.astype("<u2").tobytes()) + padded(codes.tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """float32."""
        scale = from_bfloat16(part(data, 0, -(-nnz // GROUP), "<u2"))
        codes = part(data, self._codes(nnz) + start, stop - start, "i1")
        values: Float32 = scale[np.arange(start, stop) // GROUP] * codes.astype(np.float32)
        return values

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Scales, padding, slack."""
        groups = -(-nnz // GROUP)
        bits = part(data, 0, groups, "<u2")
        with np.errstate(over="ignore", invalid="ignore"):
            _check_parameters(bits, from_bfloat16(bits) * np.float32(128))
        if data[2 * groups : self._codes(nnz)].any():
            raise FormatError("padding_not_zero", "behind the scales")
        check_zero(data, self._codes(nnz) + nnz)


class Int4:
    """I4: a sign and fl32(lo + fl32(step code)), code of 3 bits."""

    def size(self, nnz: int, size: int) -> int:
        """Pairs, nibbles, slack."""
        return 4 * -(-nnz // GROUP) + registry.align(-(-nnz // 2), 4) + registry.SLACK

    def encode(self, values: Array) -> bytes:
        """lo and step from the smallest and the largest magnitude of each group."""
        magnitude = np.abs(values)
        least = _grouped(magnitude, np.inf).min(axis=1)
        most = _grouped(magnitude, 0).max(axis=1)
        lo_bits, lo = _parameter(least)
        with np.errstate(over="ignore", invalid="ignore"):
            step_bits, step = _parameter(np.maximum((most - lo[:, 0]) / np.float32(7), 0))
            _fits(lo, step, largest=lo + step * np.float32(7))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.where(step > 0, np.clip(np.rint((_grouped(magnitude, 0) - lo) / step), 0, 7), 0)
        nibbles = np.zeros(values.size + values.size % 2, np.uint8)
        nibbles[: values.size] = codes.reshape(-1)[: values.size].astype(np.uint8) | (np.signbit(values) << 3)
        parameters = np.stack([lo_bits, step_bits], axis=1).astype("<u2").tobytes()
        return parameters + padded((nibbles[::2] | (nibbles[1::2] << 4)).tobytes()) + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """float32."""
        groups = -(-nnz // GROUP)
        parameters = from_bfloat16(part(data, 0, 2 * groups, "<u2")).reshape(groups, 2)
        rank = np.arange(start, stop)
        nibbles = data[4 * groups + rank // 2] >> ((rank % 2) * 4).astype(np.uint8)
        lo, step = parameters[rank // GROUP].T
        magnitude: Float32 = lo + step * (nibbles & 7).astype(np.float32)
        return np.where(nibbles & 8, -magnitude, magnitude)

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Pairs, the unused nibble, padding, slack."""
        groups = -(-nnz // GROUP)
        bits = part(data, 0, 2 * groups, "<u2")
        lo, step = from_bfloat16(bits).reshape(groups, 2).T
        with np.errstate(over="ignore", invalid="ignore"):
            _check_parameters(bits, lo + step * np.float32(7))
        end = 4 * groups + -(-nnz // 2)
        if nnz % 2 and data[end - 1] >> 4:
            raise FormatError("padding_not_zero", "the last nibble")
        check_zero(data, end)


class Sign:
    """SIGN: plus or minus the mean magnitude of the group."""

    def size(self, nnz: int, size: int) -> int:
        """Magnitudes, a bitmap, slack."""
        return self._bitmap(nnz) + 4 * -(-nnz // 32) + registry.SLACK

    @staticmethod
    def _bitmap(nnz: int) -> int:
        return registry.align(-(-nnz // GROUP) * 2, 4)

    def encode(self, values: Array) -> bytes:
        """The mean is taken in binary64, summed in order."""
        counts = np.minimum(GROUP, values.size - np.arange(0, values.size, GROUP))
        total = np.add.accumulate(_grouped(np.abs(values), 0).astype(np.float64), axis=1)[:, -1]
        bits, lo = _parameter((total / counts).astype(np.float32))
        _fits(lo, largest=lo)
        signs = pack_bitmap(np.flatnonzero(np.signbit(values)), values.size)
        return padded(bits.astype("<u2").tobytes()) + signs + SLACK

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        """float32."""
        lo = from_bfloat16(part(data, 0, -(-nnz // GROUP), "<u2"))
        rank = np.arange(start, stop)
        minus = (data[self._bitmap(nnz) + rank // 8] >> (rank % 8).astype(np.uint8)) & 1
        return np.where(minus, -lo[rank // GROUP], lo[rank // GROUP])

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        """Magnitudes, unused bits, padding, slack."""
        groups = -(-nnz // GROUP)
        bits = part(data, 0, groups, "<u2")
        _check_parameters(bits, from_bfloat16(bits))
        if data[2 * groups : self._bitmap(nnz)].any():
            raise FormatError("padding_not_zero", "behind the magnitudes")
        end = self._bitmap(nnz) + -(-nnz // 8)
        if nnz % 8 and data[end - 1] >> (nnz % 8):
            raise FormatError("padding_not_zero", "unused sign bits")
        check_zero(data, end)
