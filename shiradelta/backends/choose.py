"""Chooses the backend that works on the bits of a file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from shiradelta.backends.libshd.backend import backend as libshd
from shiradelta.backends.numpy import NUMPY
from shiradelta.backends.protocols import Backend
from shiradelta.errors import ArgumentError, ShiraDeltaError
from shiradelta.util.registry import Registry


@dataclass(frozen=True)
class FileBackend:
    """A row of `FILE_BACKENDS`.

    Attributes:
        name: what a user calls it.
        load: makes the backend; raises ShiraDeltaError with the reason if it is not available.
    """

    name: str
    load: Callable[[], Backend]


#: The fastest first: "auto" takes the first available one that knows the codecs.
FILE_BACKENDS: Registry[FileBackend] = Registry(
    "backend", (FileBackend("libshd", libshd), FileBackend("numpy", lambda: NUMPY))
)
AUTO = "auto"


def choose(name: str = AUTO, index_ids: Collection[int] = (), value_ids: Collection[int] = ()) -> Backend:
    """Finds a backend by name; "auto" takes the fastest available one that knows the codecs.

    Args:
        name: "auto", or a name of `FILE_BACKENDS`.
        index_ids: index codecs that the work needs.
        value_ids: value codecs that the work needs.

    Raises:
        ArgumentError: an unknown name, or a backend that does not know one of the codecs.
        ShiraDeltaError: the backend is not available; the message says why.
    """
    if name == AUTO:
        return _first_that_fits(index_ids, value_ids)
    if name not in FILE_BACKENDS:
        raise ArgumentError(f"backend {name!r} is unknown; take {', '.join((AUTO, *FILE_BACKENDS))}")
    found = FILE_BACKENDS[name].load()
    unknown = found.unknown_codec(index_ids, value_ids)
    if unknown:
        raise ArgumentError(f"backend {name!r} does not know {unknown}; take auto or numpy")
    return found


def _first_that_fits(index_ids: Collection[int], value_ids: Collection[int]) -> Backend:
    for row in FILE_BACKENDS.values():
        try:
            found = row.load()
        except ShiraDeltaError:
            continue
        if not found.unknown_codec(index_ids, value_ids):
            return found
    return NUMPY
