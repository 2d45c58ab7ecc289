"""Decodes and applies with libshd, on several threads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_double, c_uint64, c_void_p
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shiradelta.backends.libshd.library import (
    DELTA,
    FILE,
    TENSOR,
    ZSTD_CALLBACK,
    Status,
    Weights,
    address,
    in_threads,
    library,
    new_struct,
    struct_size,
)
from shiradelta.backends.numpy import NumpyDecoder
from shiradelta.backends.protocols import Decoder
from shiradelta.errors import DeltaError, FormatError
from shiradelta.format.arithmetic import Array, Positions, out_of_range
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.record import Record, Section
from shiradelta.format.registry import BLOCK_BITS, DTYPE_OF_NAME, IndexId
from shiradelta.format.table import Table
from shiradelta.format.zstd import has_zstd, unzstd
from shiradelta.util.arrays import WINDOW, ranges

_FIRST_MISUSE = 64
_OUT_OF_RANGE = "out_of_range"
_CHECK_SIZES, _CHECK_ALL = 0, 2
#: A thread works on a multiple of this many weights: whole cache lines.
_STRIDE = 64
_NO_SCRATCH = np.empty(0, np.uint8)
#: What the library makes RICE in memory when it loads a tensor.
_RECODED = (IndexId.TILED, IndexId.SEEDED)


class LoadedTensor:
    """A tensor's delta loaded by the library: `shd_delta` and the memory that it points to."""

    def __init__(self, decoder: NativeDecoder, record: Record, check: int = _CHECK_ALL) -> None:
        self._decoder, self.record = decoder, record
        number = decoder.records.numbers[record.name]
        self._scratch = _NO_SCRATCH
        if decoder.needs_scratch[number]:
            tensor = new_struct(TENSOR)
            decoder.call(library().shd_tensor_at, record, decoder.file, number, address(tensor))
            self._scratch = np.empty(library().shd_scratch_size(decoder.file, address(tensor)), np.uint8)
        self._struct = new_struct(DELTA)
        self.address = address(self._struct)
        scratch = (address(self._scratch) if self._scratch.size else None), self._scratch.size
        self._call(library().shd_load, decoder.file, number, check, *scratch, self.address)
        # `block_count` follows the copy of the tensor's record.
        self.blocks = c_uint64.from_address(self.address + struct_size(TENSOR)).value

    def _call(self, function: Any, *arguments: Any) -> None:
        self._decoder.call(function, self.record, *arguments)

    def positions(self) -> Positions:
        """int64 [nnz]."""
        result = np.empty(self.record.nnz, np.int64)

        def work(first: int, last: int) -> None:
            rank = self._rank(first)
            self._decode(first, last, result[rank : self._rank(last)])

        in_threads(work, self.blocks, self.record.nnz)
        return result

    def positions_of_blocks(self, first: int, last: int) -> Positions:
        """int64, of the blocks from first to last - 1."""
        result = np.empty(self._rank(last) - self._rank(first), np.int64)
        self._decode(first, last, result)
        return result

    def _rank(self, block: int) -> int:
        """The number of nonzeros before a block."""
        if block in (0, self.blocks):
            return self.record.nnz if block else 0
        return int(library().shd_block_rank(self.address, block))

    def _decode(self, first: int, last: int, room: Positions) -> None:
        self._call(library().shd_positions, self.address, first, last, address(room), room.size, byref(c_uint64()))

    def bits(self, first: int, count: int) -> Array:
        """Bits of `count` nonzeros from a rank on, unsigned."""
        size = 4 if self.record.adds else self.record.element_size
        result = np.empty(count, f"<u{size}")
        function = library().shd_values if self.record.adds else library().shd_elements
        self._call(function, self.address, first, count, address(result))
        return result

    def between(self, start: int, stop: int) -> tuple[Positions, Array]:
        """Positions in [start, stop) and their bits."""
        rank, count = c_uint64(), c_uint64()
        find = library().shd_positions_between
        self._call(find, self.address, start, stop, None, 0, byref(rank), byref(count))
        positions = np.empty(count.value, np.int64)
        self._call(find, self.address, start, stop, address(positions), count.value, byref(rank), byref(count))
        return positions, self.bits(rank.value, count.value)

    def run(self, start: int, stop: int) -> tuple[int, Positions]:
        """(rank of the first, positions) in [start, stop), of a tensor whose directory has been checked."""
        first, last = c_uint64(), c_uint64()
        assert library().shd_find_blocks(self.address, start, stop, byref(first), byref(last)) == 0
        positions = self.positions_of_blocks(first.value, last.value)
        skip, end = np.searchsorted(positions, (start, stop)).tolist()
        return self._rank(first.value) + skip, positions[skip:end]

    def apply(self, weight: Array, dtype: str, strength: float, saved: Array | None = None) -> None:
        """Patches all elements' bits; `saved`, [nnz] of the same dtype, receives what is overwritten.

        Raises:
            DeltaError: ULP moves an element out of the range of its dtype; all elements are as they were.
        """
        if saved is None and self.record.operation.shifts:
            saved = np.empty(self.record.nnz, weight.dtype)
        weights = Weights(address(weight), 0, weight.size, DTYPE_OF_NAME[dtype].id, 1)
        room = None if saved is None else address(saved)
        done: list[tuple[int, int]] = []

        def work(first: int, last: int) -> None:
            self._call(library().shd_apply, self.address, byref(weights), strength, first, last, room)
            done.append((first, last))

        try:
            in_threads(work, self.blocks, self.record.nnz)
        except DeltaError:  # the call that failed has put back its own blocks
            for first, last in done:
                self._call(library().shd_revert, self.address, byref(weights), first, last, room)
            raise

    def fingerprint(self, weight: Array, dtype: str) -> int:
        """The fingerprint of all elements' bits at the positions (FORMAT.md, 6.3)."""
        weights, result = Weights(address(weight), 0, weight.size, DTYPE_OF_NAME[dtype].id, 1), c_uint64()
        self._call(library().shd_fingerprint, self.address, byref(weights), 0, self.blocks, byref(result))
        return result.value

    def revert(self, weight: Array, dtype: str, saved: Array) -> None:
        """Writes back the elements that `apply` saved."""
        weights = Weights(address(weight), 0, weight.size, DTYPE_OF_NAME[dtype].id, 1)

        def work(first: int, last: int) -> None:
            self._call(library().shd_revert, self.address, byref(weights), first, last, address(saved))

        in_threads(work, self.blocks, self.record.nnz)


def apply_sum(
    addends: Sequence[tuple[LoadedTensor, float, Array]], weight: Array, dtype: str, from_saved: bool = False
) -> None:
    """Patches all elements' bits with several ADDs, summed in this order (FORMAT.md, 6.2).

    Args:
        addends: (delta, strength, saved), of which `saved`, [nnz] of `dtype`, receives the base's elements.
        weight: all elements' bits, flat.
        dtype: that of the elements.
        from_saved: the same deltas are on the weights, so take the base's elements from `saved`, not from `weight`.
    """
    tensors, strengths, saved = zip(*addends, strict=True)
    count = len(tensors)
    deltas = (c_void_p * count)(*[tensor.address for tensor in tensors])
    alphas = (c_double * count)(*strengths)
    rooms = (c_void_p * count)(*[address(room) for room in saved])

    def work(first: int, last: int) -> None:
        first, last = first * _STRIDE, min(last * _STRIDE, weight.size)
        weights = Weights(address(weight) + first * weight.itemsize, first, last - first, DTYPE_OF_NAME[dtype].id, 1)
        scratch = np.empty(library().shd_sum_scratch_size(count), np.uint8)
        arguments = deltas, alphas, rooms, count, byref(weights), from_saved, address(scratch), scratch.size
        tensors[0]._call(library().shd_apply_sum, *arguments)

    in_threads(work, -(-weight.size // _STRIDE), sum(tensor.record.nnz for tensor in tensors))


def accepts(data: Bytes) -> bool:
    """Whether the library opens a file."""
    return bool(library().shd_open(address(new_struct(FILE)), address(data), data.size, byref(Status())) == 0)


class NativeDecoder(Decoder):
    """Decodes with libshd.  Holds the file's bytes for as long as the library may read them."""

    def __init__(self, data: Bytes, file: str | None, records: Table) -> None:
        self._data, self._name, self.records = data, file, records
        self._reference = NumpyDecoder(data, file, records)
        self._last = threading.local()  # `loaded`: the tensor that a thread has loaded last
        self._failures = threading.local()  # of a callback, until the call that it failed in has ended
        self._struct = new_struct(FILE)
        self.file = address(self._struct)
        self._check(library().shd_open, None, self.file, address(data), data.size)
        if records.zstd.any() and has_zstd():
            self._zstd = ZSTD_CALLBACK(self._decompress)  # kept: the library calls it later
            library().shd_set_zstd(self.file, self._zstd, None)

    def call(self, function: Any, record: Record, *arguments: Any) -> None:
        """Calls the library; raises its failures as FormatError."""
        self._check(function, record.name, *arguments)

    def _check(self, function: Any, name: str | None, *arguments: Any) -> None:
        status = Status()
        code = function(*arguments, byref(status))
        if code == 0:
            return
        failure: BaseException | None = getattr(self._failures, "last", None)
        if failure is not None:
            self._failures.last = None
            raise failure
        reason = library().shd_error_name(code).decode()
        if reason == _OUT_OF_RANGE:
            raise out_of_range(f"tensor {name!r}")
        if code >= _FIRST_MISUSE:
            raise AssertionError(f"{function.__name__}: {reason}")
        if name is None and status.tensor < len(self.records):
            name = self.records.names[status.tensor]
        raise FormatError(reason, offset=status.offset, tensor=name, file=self._name)

    def _decompress(self, _: Any, source: int, source_size: int, result: int, size: int) -> int:
        """The library's callback.  ctypes would swallow an exception and return 0, so `call` raises it later."""
        stored = np.ctypeslib.as_array((ctypes.c_uint8 * source_size).from_address(source))
        try:
            ctypes.memmove(result, unzstd(stored, size), size)
        except FormatError:
            return 1
        except BaseException as error:
            self._failures.last = error
            return 1
        return 0

    def load(self, record: Record) -> LoadedTensor:
        """Loads and checks a tensor; keeps a thread's last one, since positions and values are read in turn."""
        last = self._loaded(record)
        if last is None:
            last = self._last.loaded = LoadedTensor(self, record)
        return last

    def _loaded(self, record: Record) -> LoadedTensor | None:
        """A tensor, if it is the one that this thread has loaded last."""
        last: LoadedTensor | None = getattr(self._last, "loaded", None)
        return last if last is not None and last.record is record else None

    def positions(self, record: Record) -> Positions:
        return self.load(record).positions()

    def bits(self, record: Record) -> Array:
        return self.load(record).bits(0, record.nnz)

    def section(self, record: Record, which: Section, checked: bool = False) -> Bytes:
        return self._reference.section(record, which, checked)

    def position_windows(self, record: Record) -> Iterator[Positions]:
        """By blocks; a STRUCT is one block, and the reference decodes large ones."""
        loaded = self.load(record)
        if record.index_codec == IndexId.STRUCT and record.nnz > WINDOW:
            yield from self._reference.position_windows(record)
            return
        for first, last in ranges(loaded.blocks, WINDOW // BLOCK_BITS):
            yield loaded.positions_of_blocks(first, last)

    def bits_windows(self, record: Record) -> Iterator[Array]:
        loaded = self.load(record)
        for first, last in ranges(record.nnz):
            yield loaded.bits(first, last - first)

    def between(self, record: Record, start: int, stop: int) -> tuple[Positions, Array]:
        loaded = self._loaded(record) or LoadedTensor(self, record, _CHECK_SIZES)
        return loaded.between(start, stop)

    def runs(
        self, record: Record, spans: Sequence[tuple[int, int]], checked: bool = False
    ) -> list[tuple[int, Positions]]:
        loaded = self._trusted(record) if checked else self.load(record)
        return [loaded.run(start, stop) for start, stop in spans]

    def bits_from(self, record: Record, rank: int, count: int) -> Array:
        return self._trusted(record).bits(rank, count)

    def _trusted(self, record: Record) -> LoadedTensor:
        """A tensor that has been checked."""
        return self._loaded(record) or LoadedTensor(self, record, _CHECK_SIZES)

    def check(self, record: Record) -> None:
        self.check_of(np.array([self.records.numbers[record.name]]))()

    def check_of(self, numbers: NDArray[np.int64]) -> Callable[[], None]:
        """Checks tensors as loading does; all that need no memory in one call of the library."""
        is_loaded = self.needs_scratch[numbers]
        loading, others = numbers[is_loaded].tolist(), numbers[~is_loaded].astype(np.uint32)

        def check() -> None:
            for number in loading:
                LoadedTensor(self, self.records[number])
            self._check(library().shd_check, None, self.file, address(others), others.size)

        return check

    @cached_property
    def needs_scratch(self) -> NDArray[np.bool_]:
        """For each tensor, whether the library decompresses or recodes a section of it in memory when it loads it."""
        found = self.records.zstd.copy()
        for codec in self.records.index_codecs.intersection(_RECODED):
            found |= self.records.rows["index_codec"] == codec
        return found

    def patch(self, record: Record, weight: Array, dtype: str, strength: float) -> None:
        """Decodes and applies in one pass, on several threads."""
        if not record.nnz:
            return
        if weight.ctypes.data % weight.itemsize:  # a tensor may lie anywhere in a safetensors file
            self._reference.patch(record, weight, dtype, strength)
        else:
            self.load(record).apply(weight, dtype, strength)
