"""What `HotSwap` reports about adapters and switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadReport:
    """What `load` found.

    Attributes:
        name: of the adapter.
        matched: the file's names -> the model's.
        unmatched: the file's names that were left out, as `skip` or `names` allowed.
        unchecked: matched tensors whose fingerprint was not compared: the file has none, or another dtype.
        nonzeros: number of elements that the adapter changes.
        nbytes: memory that the adapter takes while it is loaded.
        beneath: adapter -> strength, for the adapters that a successor was made for; empty for a delta of the base.
    """

    name: str
    matched: Mapping[str, str]
    unmatched: tuple[str, ...]
    unchecked: tuple[str, ...]
    nonzeros: int
    nbytes: int
    beneath: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SwitchReport:
    """What is on the model after a switch.

    Attributes:
        active: adapter -> strength.
        tensors: number of tensors that the active adapters change.
        nonzeros: of all active adapters together.
        nbytes: memory of the saved elements.
    """

    active: Mapping[str, float]
    tensors: int
    nonzeros: int
    nbytes: int


@dataclass(frozen=True)
class RebaseReport:
    """What `rebase` found.

    Attributes:
        changed: the tensors that were seen to be changed from outside, wholly or in part: elements of an active adapter
            that were not overwritten are a part of the new base.
        kept: the tensors with an active adapter that were not seen to be changed; it is a part of the new base there.
        unchecked: adapter -> matched tensors whose fingerprint was not compared with the new base.
    """

    changed: tuple[str, ...]
    kept: tuple[str, ...]
    unchecked: Mapping[str, tuple[str, ...]]
