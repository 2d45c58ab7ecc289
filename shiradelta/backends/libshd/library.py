"""libshd through ctypes: finds the library, declares its structs and functions, and lists its codecs.

The interpreter's lock is released while the library works.  Structs mirror libshd/include/shd.h; a library of
another ABI is refused.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta
from shiradelta.errors import MissingDependencyError, ShiraDeltaError
from shiradelta.format.arithmetic import Array
from shiradelta.format.header import use_crc32
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.util import threads
from shiradelta.util.threads import THREADS

ABI = 1
#: With fewer nonzeros than this, a second thread costs more than it gains.
_THREAD_NONZEROS = 1 << 16


class Status(ctypes.Structure):
    """`shd_status`."""

    _fields_ = (("code", ctypes.c_int32), ("tensor", c_uint32), ("offset", c_uint64))


class Weights(ctypes.Structure):
    """`shd_weights`."""

    _fields_ = (
        ("data", c_void_p),
        ("first_position", c_uint64),
        ("count", c_uint64),
        ("dtype", ctypes.c_int32),
        ("any_dtype", ctypes.c_int32),
    )


class TiledGrid(ctypes.Structure):
    """`shd_tiled`."""

    _fields_ = (
        ("numel", c_uint64),
        ("columns", c_uint64),
        ("k", c_void_p),
        ("row_classes", c_void_p),
        ("column_classes", c_void_p),
        ("tile_rows", c_uint32),
        ("row_bits", c_uint32),
        ("column_bits", c_uint32),
    )


class FromBaseReader(ctypes.Structure):
    """`shd_from_base`."""

    _fields_ = (
        ("next_position", c_uint64),
        ("next_count", c_uint64),
        ("nnz", c_uint64),
        ("rank", c_uint64),
        ("state", c_void_p),
    )


class BaseGridStruct(ctypes.Structure):
    """`shd_base_grid`."""

    _fields_ = (
        ("numel", c_uint64),
        ("columns", c_uint64),
        ("thresholds", c_void_p),
        ("groups", c_void_p),
        ("row_classes", c_void_p),
        ("column_classes", c_void_p),
        ("classes", c_uint32),
        ("tile_rows", c_uint32),
        ("row_bits", c_uint32),
        ("column_bits", c_uint32),
    )


class RicePlan(ctypes.Structure):
    """`shd_rice`."""

    _fields_ = (
        ("numel", c_uint64),
        ("count", c_uint64),
        ("unary_bits", c_uint64),
        ("size", c_uint64),
        ("k", c_uint32),
        ("word", c_uint32),
    )


ZSTD_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)
#: The arguments of `shd_struct_size`.
STATUS, FILE, TENSOR, DELTA, WEIGHTS, RICE, TILED, FROM_BASE, BASE_GRID = range(9)
_MIRRORED = {
    STATUS: Status,
    WEIGHTS: Weights,
    RICE: RicePlan,
    TILED: TiledGrid,
    FROM_BASE: FromBaseReader,
    BASE_GRID: BaseGridStruct,
}

_p = c_void_p
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "shd_version": (c_char_p, ()),
    "shd_abi": (c_int, ()),
    "shd_simd": (c_char_p, ()),
    "shd_struct_size": (c_size_t, (c_int,)),
    "shd_error_name": (c_char_p, (c_int,)),
    "shd_crc32": (c_uint32, (c_uint32, _p, c_size_t)),
    "shd_open": (c_int, (_p, _p, c_uint64, POINTER(Status))),
    "shd_set_zstd": (None, (_p, ZSTD_CALLBACK, _p)),
    "shd_tensor_at": (c_int, (_p, c_uint32, _p, POINTER(Status))),
    "shd_scratch_size": (c_uint64, (_p, _p)),
    "shd_load": (c_int, (_p, c_uint32, c_int, _p, c_uint64, _p, POINTER(Status))),
    "shd_check": (c_int, (_p, _p, c_uint32, POINTER(Status))),
    "shd_block_rank": (c_uint64, (_p, c_uint64)),
    "shd_find_blocks": (c_int, (_p, c_uint64, c_uint64, POINTER(c_uint64), POINTER(c_uint64))),
    "shd_positions": (c_int, (_p, c_uint64, c_uint64, _p, c_uint64, POINTER(c_uint64), POINTER(Status))),
    "shd_positions_between": (
        c_int,
        (_p, c_uint64, c_uint64, _p, c_uint64, POINTER(c_uint64), POINTER(c_uint64), POINTER(Status)),
    ),
    "shd_values": (c_int, (_p, c_uint64, c_uint64, _p, POINTER(Status))),
    "shd_elements": (c_int, (_p, c_uint64, c_uint64, _p, POINTER(Status))),
    "shd_apply": (c_int, (_p, POINTER(Weights), c_double, c_uint64, c_uint64, _p, POINTER(Status))),
    "shd_sum_scratch_size": (c_uint64, (c_uint32,)),
    "shd_apply_sum": (
        c_int,
        (_p, POINTER(c_double), _p, c_uint32, POINTER(Weights), c_int, _p, c_uint64, POINTER(Status)),
    ),
    "shd_revert": (c_int, (_p, POINTER(Weights), c_uint64, c_uint64, _p, POINTER(Status))),
    "shd_fingerprint": (c_int, (_p, POINTER(Weights), c_uint64, c_uint64, POINTER(c_uint64), POINTER(Status))),
    "shd_fingerprint_elements": (c_int, (_p, c_uint64, _p, c_uint64, c_uint32, POINTER(c_uint64))),
    "shd_knows_index_codec": (c_int, (c_int,)),
    "shd_rice_plan": (c_int, (_p, c_uint64, c_uint64, POINTER(RicePlan))),
    "shd_rice_encode": (c_int, (POINTER(RicePlan), _p, _p, c_uint64)),
    "shd_tiled_scratch_size": (c_uint64, (POINTER(TiledGrid),)),
    "shd_tiled_encode": (
        c_int,
        (POINTER(TiledGrid), _p, c_uint64, _p, c_uint64, _p, c_uint64, POINTER(c_uint64)),
    ),
    "shd_from_base_scratch_size": (c_uint64, (_p, c_uint64)),
    "shd_from_base_open": (c_int, (POINTER(FromBaseReader), _p, c_uint64, c_uint64, c_uint64, _p, c_uint64)),
    "shd_from_base_next": (c_int, (POINTER(FromBaseReader), _p, c_uint32, _p, c_uint64, POINTER(c_uint64))),
    "shd_from_base_plan_size": (c_uint64, (POINTER(BaseGridStruct),)),
    "shd_from_base_plan": (
        c_int,
        (POINTER(BaseGridStruct), _p, c_uint32, _p, c_uint64, _p, c_uint64, POINTER(c_uint64)),
    ),
    "shd_from_base_encode": (c_int, (POINTER(BaseGridStruct), _p, c_uint32, _p, c_uint64, _p, _p, c_uint64)),
    "shd_key_counts": (c_int, (_p, c_uint64, c_uint32, _p)),
    "shd_line_counts": (c_int, (POINTER(BaseGridStruct), _p, c_uint32, _p, _p)),
    "shd_joint_counts": (c_int, (POINTER(BaseGridStruct), _p, c_uint32, _p)),
    "shd_ulp_from_base_decode": (c_int, (_p, c_uint64, _p, c_uint32, c_uint64, _p)),
    "shd_values_size": (c_uint64, (c_int, c_int, c_uint64)),
    "shd_values_encode": (c_int, (c_int, _p, c_uint64, _p, c_uint64)),
    "shd_select_at_least": (c_int, (_p, c_uint64, c_float, c_uint64, _p, c_uint64, POINTER(c_uint64))),
}


def library_name() -> str:
    """The file name of the shared library on this system."""
    return {"win32": "shd.dll", "darwin": "libshd.dylib"}.get(sys.platform, "libshd.so")


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        MissingDependencyError: the library was not built.
        ShiraDeltaError: it cannot be loaded, or has another ABI.
    """
    override = os.environ.get("SHIRADELTA_LIBSHD")
    candidates = [Path(override)] if override else [Path(folder) / library_name() for folder in shiradelta.__path__]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise MissingDependencyError(
            f"{library_name()} is not installed with this package (no C compiler when it was built?); install it again"
            " where there is one, or use backend='numpy'"
        )
    try:
        loaded = ctypes.CDLL(str(path))
        abi = loaded.shd_abi()
        functions = {name: getattr(loaded, name) for name in _PROTOTYPES}
    except (OSError, AttributeError) as error:
        raise ShiraDeltaError(f"{path}: cannot be loaded ({error}); install shiradelta again") from None
    if abi != ABI:
        raise ShiraDeltaError(f"{path}: has ABI {abi}, this package needs {ABI}; install shiradelta again")
    for name, (result, arguments) in _PROTOTYPES.items():
        functions[name].restype, functions[name].argtypes = result, arguments
    for which, struct in _MIRRORED.items():
        if loaded.shd_struct_size(which) != ctypes.sizeof(struct):
            raise ShiraDeltaError(f"{path}: its structs have other sizes; install shiradelta again")
    use_crc32(_crc32)
    return loaded


def _crc32(data: Array | bytes, before: int) -> int:
    array = np.frombuffer(data, np.uint8)
    return int(library().shd_crc32(before, address(array), array.size))


def describe_system() -> dict[str, str]:
    """The library as `info --system` shows it, or why it is not available."""
    try:
        loaded = library()
    except ShiraDeltaError as error:
        return {"backend": "numpy", "why": str(error)}
    return {
        "backend": "libshd",
        "why": "it is installed and loads",
        "library": loaded._name,
        "version": loaded.shd_version().decode(),
        "simd": loaded.shd_simd().decode(),
        "threads": str(THREADS),
    }


def knows_index_codec(id: int) -> bool:
    """Whether the library decodes an index codec."""
    return bool(library().shd_knows_index_codec(id))


def knows_value_codec(id: int) -> bool:
    """Whether the library decodes a value codec."""
    return bool(library().shd_values_size(id, DTYPE_OF_NAME["float32"].id, 1))


def address(array: Array) -> int:
    """The address of an array's first element."""
    assert array.flags.c_contiguous, "the library reads elements row by row"
    return array.ctypes.data


@cache
def struct_size(which: int) -> int:
    """Bytes of a struct of the library."""
    return int(library().shd_struct_size(which))


def new_struct(which: int) -> Array:
    """Allocates a struct whose fields only the library reads."""
    return np.zeros(struct_size(which), np.uint8)


def in_threads(work: Callable[[int, int], None], units: int, nonzeros: int) -> None:
    """Calls `work(first, last)` on as many threads as pay for `nonzeros`; see `in_ranges`."""
    threads.in_ranges(work, units, min(threads.THREADS, 1 + nonzeros // _THREAD_NONZEROS))
