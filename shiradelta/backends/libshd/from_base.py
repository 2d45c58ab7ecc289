"""FROM_BASE and ULP_FROM_BASE with libshd, given the base's elements."""

from __future__ import annotations

import math
from ctypes import byref, c_uint64

import numpy as np

from shiradelta.backends.libshd.library import BaseGridStruct, FromBaseReader, address, library
from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.base_classes import Keys
from shiradelta.format.codecs.from_base import FromBase
from shiradelta.format.codecs.from_base_classes import BaseCounts, BaseGrid
from shiradelta.format.codecs.tiles import Small
from shiradelta.format.codecs.ulp_from_base import UlpFromBase

_FIRST_MISUSE = 64


def _check(code: int) -> None:
    """Raises a failure of the library as FormatError."""
    if code:
        reason = library().shd_error_name(code).decode()
        assert code < _FIRST_MISUSE, reason
        raise FormatError(reason)


class NativeCounts(BaseCounts):
    """BaseCounts with the library."""

    def of_keys(self, base: Array) -> Positions:
        base, counts = np.ascontiguousarray(base), np.empty(1 << 15, np.int64)
        _check(library().shd_key_counts(address(base), base.size, base.itemsize, address(counts)))
        return counts

    def of_lines(self, base: Array, columns: int, thresholds: Keys) -> tuple[Positions, Positions]:
        base, classes = np.ascontiguousarray(base), thresholds.size + 1
        of_rows, of_columns = (np.empty((lines, classes), np.int64) for lines in (base.size // columns, columns))
        seen = BaseGridStruct(
            numel=base.size, columns=columns, thresholds=address(thresholds), classes=classes, tile_rows=1
        )
        rooms = address(of_rows), address(of_columns)
        _check(library().shd_line_counts(byref(seen), address(base), base.itemsize, *rooms))
        return of_rows, of_columns

    def joint(self, base: Array, thresholds: Keys, lines: tuple[Small, Small], bits: int) -> Positions:
        base, (of_rows, of_columns) = np.ascontiguousarray(base), lines
        counts = np.empty((1 << bits, 1 << bits, thresholds.size + 1), np.int64)
        seen = BaseGridStruct(
            numel=base.size,
            columns=of_columns.size,
            thresholds=address(thresholds),
            row_classes=address(of_rows),
            column_classes=address(of_columns),
            classes=thresholds.size + 1,
            tile_rows=1,
            row_bits=bits,
            column_bits=bits,
        )
        _check(library().shd_joint_counts(byref(seen), address(base), base.itemsize, address(counts)))
        return counts


class NativeFromBase(FromBase):
    """The index codec FROM_BASE with the library."""

    counts = NativeCounts()

    def encode_in(self, positions: Positions, grid: BaseGrid, base: Array) -> bytes:
        if not positions.size:
            return super().encode_in(positions, grid, base)
        base = np.ascontiguousarray(base)
        seen = BaseGridStruct(
            numel=grid.row_class.size * grid.columns,
            columns=grid.columns,
            thresholds=address(grid.thresholds),
            groups=address(grid.groups),
            row_classes=address(grid.row_class),
            column_classes=address(grid.column_class),
            classes=grid.thresholds.size + 1,
            tile_rows=grid.tile_rows,
            row_bits=grid.row_bits,
            column_bits=grid.column_bits,
        )
        scratch, size = np.empty(library().shd_from_base_plan_size(byref(seen)), np.uint8), c_uint64()
        given = byref(seen), address(base), base.itemsize, address(positions), positions.size, address(scratch)
        _check(library().shd_from_base_plan(*given, scratch.size, byref(size)))
        section = np.empty(size.value, np.uint8)
        _check(library().shd_from_base_encode(*given, address(section), section.size))
        return section.tobytes()

    def room(self, data: Bytes, numel: int) -> int:
        return 0  # it goes from tile to tile

    def decode_on(self, data: Bytes, nnz: int, shape: tuple[int, ...], base: Array) -> Positions:
        base, positions = np.ascontiguousarray(base), np.empty(nnz, np.int64)
        scratch = np.empty(library().shd_from_base_scratch_size(address(data), data.size), np.uint8)
        reader, count = FromBaseReader(), c_uint64()
        section = address(data), data.size, math.prod(shape), nnz
        _check(library().shd_from_base_open(byref(reader), *section, address(scratch), scratch.size))
        while reader.next_count:
            elements = address(base) + reader.next_position * base.itemsize
            rank = min(reader.rank, nnz)
            room = address(positions) + rank * positions.itemsize, nnz - rank
            _check(library().shd_from_base_next(byref(reader), elements, base.itemsize, *room, byref(count)))
        return positions


class NativeUlpFromBase(UlpFromBase):
    """The value codec ULP_FROM_BASE with the library."""

    def decode_on(self, data: Bytes, nnz: int, size: int, base: Array) -> Array:
        base, shifts = np.ascontiguousarray(base), np.empty(nnz, f"<u{size}")
        section = address(data), data.size
        _check(library().shd_ulp_from_base_decode(*section, address(base), size, nnz, address(shifts)))
        return shifts
