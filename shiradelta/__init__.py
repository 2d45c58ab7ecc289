"""shiradelta: sparse weight deltas, small, switched fast and taken out again exactly.

Names are loaded when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shiradelta import _moved

if TYPE_CHECKING:
    from shiradelta import chain as chain
    from shiradelta.combine.fuse import fuse
    from shiradelta.converters import convert
    from shiradelta.errors import (
        ArgumentError,
        BaseMismatchError,
        ChainError,
        DeltaError,
        DivergedError,
        FormatError,
        LimitError,
        MissingDependencyError,
        NoAnswerError,
        ShiraDeltaError,
        SignatureError,
        SourceError,
        TargetError,
        UnreachableError,
    )
    from shiradelta.exports.run import export
    from shiradelta.folder.apply import apply
    from shiradelta.folder.recode import recode
    from shiradelta.folder.revert import revert
    from shiradelta.folder.sign import sign
    from shiradelta.folder.verification import verify
    from shiradelta.format.delta import TensorDelta
    from shiradelta.hotswap.load import load
    from shiradelta.hotswap.session import HotSwap
    from shiradelta.io.reader import open_delta
    from shiradelta.io.writer import save_delta
    from shiradelta.publish.push import push_to_hub
    from shiradelta.signing.verify import verify_signature

    __version__: str

__all__ = [
    "ArgumentError",
    "BaseMismatchError",
    "ChainError",
    "DeltaError",
    "DivergedError",
    "FormatError",
    "HotSwap",
    "LimitError",
    "MissingDependencyError",
    "NoAnswerError",
    "ShiraDeltaError",
    "SignatureError",
    "SourceError",
    "TargetError",
    "TensorDelta",
    "UnreachableError",
    "apply",
    "convert",
    "export",
    "fuse",
    "load",
    "open_delta",
    "push_to_hub",
    "recode",
    "revert",
    "save_delta",
    "sign",
    "verify",
    "verify_signature",
]

#: Name -> its module.  Errors are in `errors`.
_HOMES = {
    "HotSwap": "hotswap.session",
    "TensorDelta": "format.delta",
    "apply": "folder.apply",
    "convert": "converters",
    "export": "exports.run",
    "fuse": "combine.fuse",
    "load": "hotswap.load",
    "open_delta": "io.reader",
    "push_to_hub": "publish.push",
    "recode": "folder.recode",
    "revert": "folder.revert",
    "save_delta": "io.writer",
    "sign": "folder.sign",
    "verify": "folder.verification",
    "verify_signature": "signing.verify",
}


_moved.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from shiradelta.util.version import VERSION

        return VERSION
    if name == "chain":
        return import_module("shiradelta.chain")
    if name not in __all__:
        raise AttributeError(f"module 'shiradelta' has no attribute {name!r}")
    from shiradelta.util.optional import importing

    with importing(f"shiradelta.{name}"):
        return getattr(import_module(f"shiradelta.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
