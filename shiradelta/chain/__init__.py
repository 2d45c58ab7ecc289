"""Chains: a history of a model's steps, published in a store and followed exactly (spec/CHAIN.md).

from shiradelta.chain import Chain, FolderFollower
chain = Chain.create("chain/", "model/")   # version 0, with an anchor
chain.publish("step.shd")                  # version 1
FolderFollower("chain/", "copy/").follow() # elsewhere: an anchor, then the steps

Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiradelta.chain.chain import Chain
    from shiradelta.chain.follow import FolderFollower, LiveFollower, status
    from shiradelta.chain.inflight import InFlight
    from shiradelta.chain.manifest import Manifest
    from shiradelta.chain.rows import Anchor, Step

__all__ = ["Anchor", "Chain", "FolderFollower", "InFlight", "LiveFollower", "Manifest", "Step", "status"]

_HOMES = {
    **dict.fromkeys(("Anchor", "Step"), "rows"),
    "InFlight": "inflight",
    "Manifest": "manifest",
    **dict.fromkeys(("FolderFollower", "LiveFollower", "status"), "follow"),
    "Chain": "chain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
