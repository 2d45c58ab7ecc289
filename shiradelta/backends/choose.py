"""Which backend works on the bits of a file."""

from __future__ import annotations

from shiradelta.backends import libshd
from shiradelta.backends.numpy import NUMPY
from shiradelta.backends.protocols import Backend
from shiradelta.errors import DeltaError, ShiraDeltaError

BACKENDS = ("auto", "libshd", "numpy")


def choose(name: str = "auto") -> Backend:
    """The backend of a name; "auto" is libshd where it can be loaded.

    Raises:
        DeltaError: an unknown name.
        ShiraDeltaError: libshd is asked for and cannot be had, and why.
    """
    if name not in BACKENDS:
        raise DeltaError(f"backend {name!r} is unknown; take {', '.join(BACKENDS)}")
    if name == "numpy":
        return NUMPY
    try:
        return libshd.backend()
    except ShiraDeltaError:
        if name == "libshd":
            raise
        return NUMPY
