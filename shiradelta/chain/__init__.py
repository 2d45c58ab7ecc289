"""Chains: a history of a model's steps, published in a store and followed exactly (spec/CHAIN.md).

from shiradelta.chain import Chain
chain = Chain.create("chain/", "model/")   # version 0, with an anchor
chain.publish("step.shd")                  # version 1
chain.fold(0, 1)                           # one file for the way from 0 to 1

Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiradelta.chain.chain import Chain
    from shiradelta.chain.manifest import Anchor, Manifest, Step

__all__ = ["Anchor", "Chain", "Manifest", "Step"]

_HOMES = {"Anchor": "manifest", "Chain": "chain", "Manifest": "manifest", "Step": "manifest"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
