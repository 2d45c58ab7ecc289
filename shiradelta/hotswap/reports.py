"""What `HotSwap` reports about adapters and switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shiradelta.util.html import html_table
from shiradelta.util.text import brief, count, size


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
        seconds: how long loading took.
        transcoded: number of tensors that are not in one piece in memory, so that their deltas were encoded anew.
        beneath: adapter -> strength, for the adapters that a successor was made for; empty for a delta of the base.
    """

    name: str
    matched: Mapping[str, str] = field(repr=False)
    unmatched: tuple[str, ...] = field(repr=False)
    unchecked: tuple[str, ...] = field(repr=False)
    nonzeros: int
    nbytes: int
    seconds: float = field(default=0.0, compare=False)
    transcoded: int = 0
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


@dataclass(frozen=True)
class SelfTestReport:
    """What `selftest` found; what an engine's output does not follow is an error.

    Attributes:
        followed: the tensors that the output follows.
        unseen: the tensors of which the output tells nothing: it hardly depends on them, whatever computes it, or their
            elements are no floating-point numbers.
    """

    followed: tuple[str, ...]
    unseen: tuple[str, ...]


def adapters_line(loaded: Mapping[str, LoadReport], active: Mapping[str, float]) -> str:
    """The loaded adapters with their strengths, in a short line; 0 for one that is not active."""
    return brief(", ".join(f"{name!r} at {active.get(name, 0):g}" for name in loaded) or "no adapter is loaded")


def adapters_table(title: str, loaded: Mapping[str, LoadReport], active: Mapping[str, float]) -> str:
    """The loaded adapters as a table for notebooks, in HTML."""
    rows = [
        [name, f"{active.get(name, 0):g}", f"{len(report.matched):,}", f"{report.nonzeros:,}", size(report.nbytes)]
        for name, report in loaded.items()
    ]
    return html_table(
        f"{title}, {count(loaded, 'adapter')}", [["adapter", "strength", "tensors", "nonzeros", "memory"], *rows]
    )
