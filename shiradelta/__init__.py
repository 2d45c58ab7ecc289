"""shiradelta: sparse weight deltas, small, switched fast and taken out again exactly.

Names are loaded when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiradelta.converters import convert
    from shiradelta.delta import TensorDelta
    from shiradelta.engine.directory import apply, revert
    from shiradelta.engine.hotswap import HotSwap
    from shiradelta.engine.verification import verify
    from shiradelta.errors import FormatError, ShiraDeltaError
    from shiradelta.fusion import fuse
    from shiradelta.reader import open_delta
    from shiradelta.writer import save_delta

__all__ = [
    "FormatError",
    "HotSwap",
    "ShiraDeltaError",
    "TensorDelta",
    "apply",
    "convert",
    "fuse",
    "open_delta",
    "revert",
    "save_delta",
    "verify",
]

_HOMES = {
    "FormatError": "errors",
    "HotSwap": "engine.hotswap",
    "ShiraDeltaError": "errors",
    "TensorDelta": "delta",
    "apply": "engine.directory",
    "convert": "converters",
    "fuse": "fusion",
    "open_delta": "reader",
    "revert": "engine.directory",
    "save_delta": "writer",
    "verify": "engine.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shiradelta' has no attribute {name!r}")
    return getattr(import_module(f"shiradelta.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
