"""The fast backend: libshd through ctypes.  The interpreter's lock is released while it works.

Structs are those of libshd/include/shd.h; a library of another ABI is refused.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

import shiradelta
from shiradelta.backends.numpy import NumpyDecoder, has_zstd, unzstd
from shiradelta.backends.protocols import Backend
from shiradelta.errors import FormatError, ShiraDeltaError
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, ValueCodec
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.container import Record
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.format.registry import IndexCodec as IndexId
from shiradelta.format.registry import ValueCodec as ValueId

ABI = 1
_FIRST_MISUSE = 64
_CHECK_SIZES, _CHECK_ALL = 0, 2
#: Weights that one thread does at a time are a multiple of this: whole cache lines.
_STRIDE = 64
#: Nonzeros below which a second thread costs more than it brings.
_THREAD_NONZEROS = 1 << 16
THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)


class _Status(ctypes.Structure):
    _fields_ = (("code", ctypes.c_int32), ("tensor", c_uint32), ("offset", c_uint64))


class _Weights(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("first_position", c_uint64),
        ("count", c_uint64),
        ("dtype", ctypes.c_int32),
        ("any_dtype", ctypes.c_int32),
    )


class _Rice(ctypes.Structure):
    _fields_ = (
        ("numel", c_uint64),
        ("count", c_uint64),
        ("unary_bits", c_uint64),
        ("size", c_uint64),
        ("k", c_uint32),
        ("word", c_uint32),
    )


_ZSTD = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)
_STATUS, _FILE, _TENSOR, _DELTA, _WEIGHTS, _RICE = range(6)

_p = c_void_p
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "shd_version": (c_char_p, ()),
    "shd_abi": (c_int, ()),
    "shd_simd": (c_char_p, ()),
    "shd_struct_size": (c_size_t, (c_int,)),
    "shd_error_name": (c_char_p, (c_int,)),
    "shd_open": (c_int, (_p, _p, c_uint64, POINTER(_Status))),
    "shd_set_zstd": (None, (_p, _ZSTD, _p)),
    "shd_tensor_at": (c_int, (_p, c_uint32, _p, POINTER(_Status))),
    "shd_scratch_size": (c_uint64, (_p, _p)),
    "shd_load": (c_int, (_p, c_uint32, c_int, _p, c_uint64, _p, POINTER(_Status))),
    "shd_block_rank": (c_uint64, (_p, c_uint64)),
    "shd_positions": (c_int, (_p, c_uint64, c_uint64, _p, c_uint64, POINTER(c_uint64), POINTER(_Status))),
    "shd_positions_between": (
        c_int,
        (_p, c_uint64, c_uint64, _p, c_uint64, POINTER(c_uint64), POINTER(c_uint64), POINTER(_Status)),
    ),
    "shd_values": (c_int, (_p, c_uint64, c_uint64, _p, POINTER(_Status))),
    "shd_elements": (c_int, (_p, c_uint64, c_uint64, _p, POINTER(_Status))),
    "shd_apply": (c_int, (_p, POINTER(_Weights), c_double, c_uint64, c_uint64, _p, POINTER(_Status))),
    "shd_sum_scratch_size": (c_uint64, (c_uint32,)),
    "shd_apply_sum": (
        c_int,
        (_p, POINTER(c_double), _p, c_uint32, POINTER(_Weights), c_int, _p, c_uint64, POINTER(_Status)),
    ),
    "shd_revert": (c_int, (_p, POINTER(_Weights), c_uint64, c_uint64, _p, POINTER(_Status))),
    "shd_fingerprint_elements": (c_int, (_p, c_uint64, _p, c_uint64, c_uint32, POINTER(c_uint64))),
    "shd_rice_plan": (c_int, (_p, c_uint64, c_uint64, POINTER(_Rice))),
    "shd_rice_encode": (c_int, (POINTER(_Rice), _p, _p, c_uint64)),
    "shd_values_size": (c_uint64, (c_int, c_int, c_uint64)),
    "shd_values_encode": (c_int, (c_int, _p, c_uint64, _p, c_uint64)),
    "shd_select_at_least": (c_int, (_p, c_uint64, c_float, c_uint64, _p, c_uint64, POINTER(c_uint64))),
}


def library_name() -> str:
    """What the shared library is called here."""
    return {"win32": "shd.dll", "darwin": "libshd.dylib"}.get(sys.platform, "libshd.so")


@cache
def _library() -> ctypes.CDLL:
    """The loaded library.  Raises ShiraDeltaError where there is none, or one of another ABI."""
    override = os.environ.get("SHIRADELTA_LIBSHD")
    candidates = [Path(override)] if override else [Path(folder) / library_name() for folder in shiradelta.__path__]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise ShiraDeltaError(
            f"{library_name()} is not installed with this package (no C compiler when it was built?); install it again"
            " where there is one, or use backend='numpy'"
        )
    try:
        library = ctypes.CDLL(str(path))
        abi = library.shd_abi()
        functions = {name: getattr(library, name) for name in _PROTOTYPES}
    except (OSError, AttributeError) as error:
        raise ShiraDeltaError(f"{path}: cannot be loaded ({error}); install shiradelta again") from None
    if abi != ABI:
        raise ShiraDeltaError(f"{path}: has ABI {abi}, this package needs {ABI}; install shiradelta again")
    for name, (result, arguments) in _PROTOTYPES.items():
        functions[name].restype, functions[name].argtypes = result, arguments
    for which, struct in ((_STATUS, _Status), (_WEIGHTS, _Weights), (_RICE, _Rice)):
        if library.shd_struct_size(which) != ctypes.sizeof(struct):
            raise ShiraDeltaError(f"{path}: its structs have other sizes; install shiradelta again")
    return library


def describe() -> dict[str, str]:
    """What `info --system` shows: the library, or why there is none."""
    try:
        library = _library()
    except ShiraDeltaError as error:
        return {"backend": "numpy", "why": str(error)}
    return {
        "backend": "libshd",
        "why": "it is installed and loads",
        "library": library._name,
        "version": library.shd_version().decode(),
        "simd": library.shd_simd().decode(),
        "threads": str(THREADS),
    }


def _address(array: Array) -> int:
    return array.ctypes.data


def _new_struct(which: int) -> Array:
    """Room for a struct that only the library looks into."""
    return np.zeros(_library().shd_struct_size(which), np.uint8)


def _in_threads(work: Callable[[int, int], None], units: int, nonzeros: int) -> None:
    """work(first, last), once each, over ranges of blocks or the like that do not overlap.

    What no thread can be had for is done here, so that a system short of them does not leave work half done.
    """
    count = min(THREADS, units, 1 + nonzeros // _THREAD_NONZEROS)
    edges = [units * i // count for i in range(count + 1)]
    failures: list[BaseException] = []

    def guarded(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as error:
            failures.append(error)

    threads, here = [], [(edges[0], edges[1])]
    for part in pairwise(edges[1:]):
        try:
            thread = Thread(target=guarded, args=part)
            thread.start()
            threads.append(thread)
        except (RuntimeError, MemoryError):
            here.append(part)
    for part in here:
        guarded(*part)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class LoadedTensor:
    """A tensor's delta, ready in the library: `shd_delta` and what it points to."""

    def __init__(self, decoder: NativeDecoder, record: Record, check: int = _CHECK_ALL) -> None:
        library = _library()
        self._decoder, self.record = decoder, record
        number = decoder.numbers[record.name]
        tensor = _new_struct(_TENSOR)
        decoder.call(library.shd_tensor_at, record, decoder.file, number, _address(tensor))
        scratch_size = library.shd_scratch_size(decoder.file, _address(tensor))
        self._scratch = np.empty(scratch_size, np.uint8)
        self._struct = _new_struct(_DELTA)
        self.address = _address(self._struct)
        self._call(library.shd_load, decoder.file, number, check, _address(self._scratch), scratch_size, self.address)
        # `block_count` stands right behind the copy of the tensor's record.
        self.blocks = int(self._struct[tensor.size : tensor.size + 8].view("<u8")[0])

    def _call(self, function: Any, *arguments: Any) -> None:
        self._decoder.call(function, self.record, *arguments)

    def positions(self) -> Positions:
        """int64 [nnz]."""
        library = _library()
        result = np.empty(self.record.nnz, np.int64)

        def work(first: int, last: int) -> None:
            rank = library.shd_block_rank(self.address, first)
            capacity = library.shd_block_rank(self.address, last) - rank
            part = result[rank : rank + capacity]
            self._call(library.shd_positions, self.address, first, last, _address(part), part.size, byref(c_uint64()))

        _in_threads(work, self.blocks, self.record.nnz)
        return result

    def bits(self, first: int, count: int) -> Array:
        """Unsigned [count]: of the nonzeros from a rank on."""
        library = _library()
        size = 4 if self.record.adds else self.record.element_size
        result = np.empty(count, f"<u{size}")
        function = library.shd_values if self.record.adds else library.shd_elements
        self._call(function, self.address, first, count, _address(result))
        return result

    def between(self, start: int, stop: int) -> tuple[Positions, Array]:
        """Positions in [start, stop) and their bits."""
        library = _library()
        rank, count = c_uint64(), c_uint64()
        find = library.shd_positions_between
        self._call(find, self.address, start, stop, None, 0, byref(rank), byref(count))
        positions = np.empty(count.value, np.int64)
        self._call(find, self.address, start, stop, _address(positions), count.value, byref(rank), byref(count))
        return positions, self.bits(rank.value, count.value)

    def apply(self, weight: Array, dtype: str, strength: float, saved: Array | None = None) -> None:
        """Patches all elements' bits; `saved`, [nnz] of the same dtype, receives what is overwritten."""
        weights = _Weights(_address(weight), 0, weight.size, DTYPE_OF_NAME[dtype].id, 1)
        address = None if saved is None else _address(saved)

        def work(first: int, last: int) -> None:
            self._call(_library().shd_apply, self.address, byref(weights), strength, first, last, address)

        _in_threads(work, self.blocks, self.record.nnz)

    def revert(self, weight: Array, dtype: str, saved: Array) -> None:
        """Puts back what `apply` saved."""
        weights = _Weights(_address(weight), 0, weight.size, DTYPE_OF_NAME[dtype].id, 1)

        def work(first: int, last: int) -> None:
            self._call(_library().shd_revert, self.address, byref(weights), first, last, _address(saved))

        _in_threads(work, self.blocks, self.record.nnz)


def apply_sum(
    addends: Sequence[tuple[LoadedTensor, float, Array]], weight: Array, dtype: str, from_saved: bool = False
) -> None:
    """Patches all elements' bits with several ADDs, summed in this order (FORMAT.md, 6.2).

    Args:
        addends: (delta, strength, saved), of which `saved`, [nnz] of `dtype`, receives the base's elements.
        weight: all elements' bits, flat.
        dtype: that of the elements.
        from_saved: the same deltas are on the weights: the base's elements are taken from `saved`, not from `weight`.
    """
    tensors, strengths, saved = zip(*addends, strict=True)
    count, library = len(tensors), _library()
    deltas = (c_void_p * count)(*[tensor.address for tensor in tensors])
    alphas = (c_double * count)(*strengths)
    rooms = (c_void_p * count)(*[_address(room) for room in saved])

    def work(first: int, last: int) -> None:
        first, last = first * _STRIDE, min(last * _STRIDE, weight.size)
        weights = _Weights(_address(weight) + first * weight.itemsize, first, last - first, DTYPE_OF_NAME[dtype].id, 1)
        scratch = np.empty(library.shd_sum_scratch_size(count), np.uint8)
        arguments = deltas, alphas, rooms, count, byref(weights), from_saved, _address(scratch), scratch.size
        tensors[0]._call(library.shd_apply_sum, *arguments)

    _in_threads(work, -(-weight.size // _STRIDE), sum(tensor.record.nnz for tensor in tensors))


class NativeDecoder:
    """A `Decoder` of libshd's.  Holds the file's bytes for as long as the library may look at them."""

    def __init__(self, data: Bytes, file: str | None, records: tuple[Record, ...]) -> None:
        self._data, self._name = data, file
        self._reference = NumpyDecoder(data, file, records)
        self.numbers = {record.name: number for number, record in enumerate(records)}
        self._struct = _new_struct(_FILE)
        self.file = _address(self._struct)
        self._check(_library().shd_open, None, self.file, _address(data), data.size)
        zstd = any(record.index.zstd or record.values.zstd for record in records)
        if zstd and has_zstd():
            self._zstd = _ZSTD(self._decompress)  # kept: the library calls it later
            _library().shd_set_zstd(self.file, self._zstd, None)
        self._last: LoadedTensor | None = None
        self._failure: BaseException | None = None

    def call(self, function: Any, record: Record, *arguments: Any) -> None:
        """Calls the library; a failure becomes the FormatError that it stands for."""
        self._check(function, record.name, *arguments)

    def _check(self, function: Any, name: str | None, *arguments: Any) -> None:
        status = _Status()
        code = function(*arguments, byref(status))
        if code == 0:
            return
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        reason = _library().shd_error_name(code).decode()
        if code >= _FIRST_MISUSE:
            raise AssertionError(f"{function.__name__}: {reason}")
        raise FormatError(reason, offset=status.offset, tensor=name, file=self._name)

    def _decompress(self, _: Any, source: int, source_size: int, result: int, size: int) -> int:
        """The library's callback.  ctypes would swallow an exception and return 0, so it is kept and raised later."""
        stored = np.ctypeslib.as_array((ctypes.c_uint8 * source_size).from_address(source))
        try:
            ctypes.memmove(result, unzstd(stored, size), size)
        except FormatError:
            return 1
        except BaseException as error:
            self._failure = error
            return 1
        return 0

    def load(self, record: Record) -> LoadedTensor:
        """The tensor, checked in full; the last one is kept, since positions and values are asked for in turn."""
        last = self._last
        if last is None or last.record is not record:
            last = self._last = LoadedTensor(self, record)
        return last

    def positions(self, record: Record) -> Positions:
        """On several threads."""
        return self.load(record).positions()

    def bits(self, record: Record) -> Array:
        """In one go."""
        return self.load(record).bits(0, record.nnz)

    def between(self, record: Record, start: int, stop: int) -> tuple[Positions, Array]:
        """Only the blocks that hold the range."""
        return LoadedTensor(self, record, _CHECK_SIZES).between(start, stop)

    def check(self, record: Record) -> None:
        """What loading does; in one call, if nothing needs memory to be decompressed to."""
        if record.index.zstd or record.values.zstd:
            LoadedTensor(self, record)
        else:
            delta = ctypes.create_string_buffer(_library().shd_struct_size(_DELTA))
            self.call(_library().shd_load, record, self.file, self.numbers[record.name], _CHECK_ALL, None, 0, delta)

    def patch(self, record: Record, weight: Array, dtype: str, strength: float) -> None:
        """Decoded and applied in one pass, on several threads."""
        if not record.nnz:
            return
        if weight.ctypes.data % weight.itemsize:  # a tensor may lie anywhere in a safetensors file
            self._reference.patch(record, weight, dtype, strength)
        else:
            self.load(record).apply(weight, dtype, strength)


class NativeRice(Rice):
    """RICE, encoded by the library."""

    def _plan(self, positions: Positions, numel: int) -> _Rice:
        plan = _Rice()
        code = _library().shd_rice_plan(_address(positions), positions.size, numel, byref(plan))
        assert code == 0, "positions of a TensorDelta are in order"
        return plan

    def size(self, positions: Positions, shape: tuple[int, ...]) -> int | None:
        """Bytes with the best k."""
        return int(self._plan(positions, int(np.prod(shape, dtype=np.int64))).size)

    def encode(self, positions: Positions, shape: tuple[int, ...]) -> bytes:
        """With the best k."""
        plan = self._plan(positions, int(np.prod(shape, dtype=np.int64)))
        section = np.empty(plan.size, np.uint8)
        code = _library().shd_rice_encode(byref(plan), _address(positions), _address(section), section.size)
        assert code == 0
        return section.tobytes()


class NativeValues:
    """A value codec, encoded by the library; the rest is the reference's."""

    def __init__(self, id: ValueId, reference: ValueCodec) -> None:
        self._id, self._reference = id, reference
        self.size, self.decode, self.check = reference.size, reference.decode, reference.check

    def encode(self, values: Array) -> bytes:
        """The canonical section, of float32 values."""
        values = np.ascontiguousarray(values, np.float32)
        section = np.empty(self.size(values.size, 0), np.uint8)
        code = _library().shd_values_encode(self._id, _address(values), values.size, _address(section), section.size)
        if code:
            return self._reference.encode(values)  # says what does not fit
        return section.tobytes()


def fingerprint(positions: Positions, bits: Array) -> int:
    """Sum of mix(position, bits) modulo 2^64 (FORMAT.md, 6.3)."""
    positions, bits = np.ascontiguousarray(positions), np.ascontiguousarray(bits)
    result = c_uint64()
    _library().shd_fingerprint_elements(
        _address(positions), 0, _address(bits), positions.size, bits.itemsize, byref(result)
    )
    return result.value


def at_least(x: Float32, threshold: float) -> Positions:
    """Indices of |x| >= threshold."""
    found, count = np.empty(x.size, np.int64), c_uint64()
    _library().shd_select_at_least(_address(x), x.size, threshold, 0, _address(found), found.size, byref(count))
    return found[: count.value].copy()


_ENCODED = (ValueId.F32, ValueId.F16, ValueId.BF16, ValueId.I8, ValueId.I4, ValueId.SIGN)


@cache
def backend() -> Backend:
    """The backend.  Raises ShiraDeltaError where the library cannot be had."""
    _library()
    return Backend(
        "libshd",
        NativeDecoder,
        {**INDEX_CODECS, IndexId.RICE: NativeRice()},
        {**VALUE_CODECS, **{id: NativeValues(id, VALUE_CODECS[id]) for id in _ENCODED}},
        fingerprint,
        at_least,
    )
