"""An adapter that a session has loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shiradelta.hotswap.layers import Held, Patch
from shiradelta.hotswap.protocol import Fit, LiveBackend
from shiradelta.hotswap.reports import LoadReport
from shiradelta.models.live import Target


@dataclass(frozen=True)
class Loaded:
    """An adapter that a session has loaded.

    Attributes:
        digest: of the file.
        held: the deltas, as the backends hold them.
        parts: the file's deltas of tensors that are in parts; `held` has them for each weight.
        report: what `load` found.
        label: the file, for messages.
    """

    digest: bytes
    held: Mapping[LiveBackend, Held]
    parts: Sequence[Fit]
    report: LoadReport
    label: str

    @property
    def was_compared(self) -> bool:
        """Whether `load` compared fingerprints."""
        return len(self.report.unchecked) < len(self.report.matched)

    def patches(self) -> Iterator[Patch]:
        """The patches on all devices."""
        return (patch for held in self.held.values() for patch in held.patches)


def targets_of(adapters: Iterable[Loaded]) -> set[Target]:
    """The tensors that adapters change."""
    return {patch.target for adapter in adapters for patch in adapter.patches()}
