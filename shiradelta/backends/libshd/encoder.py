"""Encodes with libshd: RICE sections, values, fingerprints, and the search for large values."""

from __future__ import annotations

import math
import weakref
from ctypes import byref, c_uint64

import numpy as np

from shiradelta.backends.libshd.library import RicePlan, TiledGrid, address, library
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs.base import Bytes, ValueCodec
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.codecs.tiled import Tiled
from shiradelta.format.codecs.tiled_classes import Grid


class NativeRice(Rice):
    """The RICE codec, encoding with the library."""

    def _plan(self, positions: Positions, numel: int) -> RicePlan:
        plan = RicePlan()
        code = library().shd_rice_plan(address(positions), positions.size, numel, byref(plan))
        assert code == 0, "positions of a TensorDelta are in order"
        return plan

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        return int(self._plan(positions, math.prod(shape)).size)

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        plan = self._plan(positions, math.prod(shape))
        section = np.empty(plan.size, np.uint8)
        code = library().shd_rice_encode(byref(plan), address(positions), address(section), section.size)
        assert code == 0
        return section.tobytes()


class NativeTiled(Tiled):
    """The TILED codec, encoding with the library."""

    def __init__(self) -> None:
        super().__init__()
        self._sized: tuple[weakref.ref[Positions], Grid, int] | None = None

    def size_in(self, positions: Positions, grid: Grid) -> int:
        size = self._encode(positions, grid, None)
        if not positions.flags.writeable:  # otherwise they may be others the next time
            self._sized = weakref.ref(positions), grid, size
        return size

    def encode_in(self, positions: Positions, grid: Grid) -> bytes:
        sized = self._sized
        is_known = sized is not None and sized[0]() is positions and sized[1] is grid
        section = np.empty(sized[2] if sized and is_known else self.size_in(positions, grid), np.uint8)
        self._encode(positions, grid, section)
        return section.tobytes()

    def _encode(self, positions: Positions, grid: Grid, section: Bytes | None) -> int:
        """Fills the section, if there is one; its size."""
        seen = TiledGrid(
            numel=grid.row_class.size * grid.columns,
            columns=grid.columns,
            k=address(grid.k),
            row_classes=address(grid.row_class),
            column_classes=address(grid.column_class),
            tile_rows=grid.tile_rows,
            row_bits=grid.row_bits,
            column_bits=grid.column_bits,
        )
        scratch, size = np.empty(library().shd_tiled_scratch_size(byref(seen)), np.uint8), c_uint64()
        room = (None, 0) if section is None else (address(section), section.size)
        code = library().shd_tiled_encode(
            byref(seen), address(positions), positions.size, address(scratch), scratch.size, *room, byref(size)
        )
        assert code == 0, "positions of a TensorDelta are in order"
        return size.value


class NativeValues(ValueCodec):
    """A value codec that encodes with the library, and decodes with the reference."""

    def __init__(self, reference: ValueCodec) -> None:
        self._reference = reference
        self.id, self.name, self.option, self.adds = reference.id, reference.name, reference.option, reference.adds

    def size(self, nnz: int, size: int) -> int:
        return self._reference.size(nnz, size)

    def encode(self, values: Array) -> bytes:
        values = np.ascontiguousarray(values, np.float32)
        section = np.empty(self.size(values.size, 0), np.uint8)
        code = library().shd_values_encode(self.id, address(values), values.size, address(section), section.size)
        if code:
            return self._reference.encode(values)  # raises the error that names the value
        return section.tobytes()

    def decode(self, data: Bytes, nnz: int, size: int, start: int, stop: int) -> Array:
        return self._reference.decode(data, nnz, size, start, stop)

    def check(self, data: Bytes, nnz: int, size: int) -> None:
        self._reference.check(data, nnz, size)


def fingerprint(positions: Positions, bits: Array) -> int:
    """Sum of mix(position, bits) modulo 2^64 (FORMAT.md, 6.3)."""
    positions, bits = np.ascontiguousarray(positions), np.ascontiguousarray(bits)
    result = c_uint64()
    library().shd_fingerprint_elements(
        address(positions), 0, address(bits), positions.size, bits.itemsize, byref(result)
    )
    return result.value


def at_least(x: Float32, threshold: float) -> Positions:
    """Indices of |x| >= threshold."""
    found, count = np.empty(x.size, np.int64), c_uint64()
    library().shd_select_at_least(address(x), x.size, threshold, 0, address(found), found.size, byref(count))
    return found[: count.value].copy()
