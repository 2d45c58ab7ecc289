"""An adapter that a session has loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shiradelta.errors import ArgumentError
from shiradelta.format.operations import Operation
from shiradelta.format.table import Table
from shiradelta.hotswap.fits import FitColumns
from shiradelta.hotswap.layers import Held
from shiradelta.hotswap.protocol import LiveBackend
from shiradelta.hotswap.reports import LoadReport
from shiradelta.hotswap.sections import Reading
from shiradelta.hotswap.shares import Share, Shares
from shiradelta.hotswap.transcode import InPieces
from shiradelta.models.live import Target

#: Adapter -> strength.
Strengths = Mapping[str, float]


@dataclass(frozen=True)
class Loaded:
    """An adapter that a session has loaded.

    Attributes:
        digest: of the file.
        held: the deltas, as the backends hold them.
        parts: the file's deltas of tensors that are in parts; `held` has them for each weight.
        table: the file's table.
        whole: its tensors that are whole in this process.
        nonzeros: how many there are in each share that this process has of the other ones.
        report: what `load` found.
        label: the file, for messages.
        readings: what this process has read of tensors that several processes share.
        beneath: the levels that the delta fits on top of; empty if it fits the base only.
        is_successor: whether it fits on top of these levels only, and not the base.
    """

    digest: bytes
    held: Mapping[LiveBackend, Held]
    parts: Sequence[InPieces]
    table: Table
    whole: FitColumns
    nonzeros: Shares[int]
    report: LoadReport
    label: str
    readings: Mapping[str, Reading]
    beneath: tuple[Strengths, ...] = ()
    is_successor: bool = False

    @property
    def was_compared(self) -> bool:
        """Whether `load` compared fingerprints."""
        return len(self.report.unchecked) < len(self.report.matched)

    def on(self, levels: Iterable[Strengths], is_successor: bool) -> Loaded:
        """The same adapter on top of these levels."""
        beneath = tuple(levels)
        report = replace(self.report, beneath=together(beneath) if is_successor else {})
        return replace(self, beneath=beneath, is_successor=is_successor, report=report)

    @property
    def operations(self) -> set[Operation]:
        """What the deltas do."""
        return set().union(*(held.operations for held in self.held.values()))

    def all_nonzeros(self) -> Shares[int]:
        """How many nonzeros there are in each share that this process has of the file's tensors."""
        names, nonzeros = self.table.names, self.whole.nonzeros.tolist()
        whole: dict[str, Mapping[Share, int]] = {
            names[number]: {(): nnz} for number, nnz in zip(self.whole.numbers.tolist(), nonzeros, strict=True)
        }
        return {**whole, **self.nonzeros}


def targets_of(adapters: Iterable[Loaded]) -> frozenset[Target]:
    """The tensors that adapters change."""
    every = {held.every.different for adapter in adapters for held in adapter.held.values()}
    return every.pop() if len(every) == 1 else frozenset().union(*every)


def together(levels: Iterable[Strengths]) -> dict[str, float]:
    """The adapters of all levels."""
    return {name: strength for level in levels for name, strength in level.items()}


def without(name: str, adapters: Mapping[str, Loaded]) -> dict[str, Loaded]:
    """The other adapters.  None is on top of this one any more.

    Raises:
        ArgumentError: it is beneath a successor.
    """
    left = {}
    for other, adapter in adapters.items():
        is_on_it = name in together(adapter.beneath)
        if is_on_it and adapter.is_successor:
            raise ArgumentError(
                f"adapter {name!r} is beneath {other!r}, which was made for what it gives; unload that first"
            )
        if other != name:
            left[other] = adapter.on((), False) if is_on_it else adapter
    return left


def check_loaded(names: Iterable[str], adapters: Mapping[str, Loaded]) -> None:
    """Checks that adapters are loaded.

    Raises:
        ArgumentError: one is not.
    """
    for name in names:
        if name not in adapters:
            some = ", ".join(adapters) or "none"
            raise ArgumentError(f"adapter {name!r} is not loaded ({some} are); load it first")


def changed_strengths(changes: Strengths, active: Strengths, adapters: Mapping[str, Loaded]) -> Strengths:
    """What is to be active if some adapters get other strengths and the rest keep theirs; 0 takes one out.

    Raises:
        ArgumentError: one is not loaded, or an active adapter was made for what one that is taken out gives.
    """
    check_loaded(changes, adapters)
    wanted = {name: alpha for name, alpha in {**active, **changes}.items() if alpha}
    for name in changes.keys() - wanted.keys():
        for other in wanted:
            if adapters[other].is_successor and name in together(adapters[other].beneath):
                raise ArgumentError(
                    f"adapter {name!r} is beneath {other!r}, which was made for what it gives; take that out first"
                )
    return wanted
