"""The levels that are on a session's weights: they are replaced wholly, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from shiradelta.errors import TargetError
from shiradelta.hotswap.devices import Devices, Layers, Streams
from shiradelta.hotswap.layers import Stack, different_tensors, increment_versions, patches_on, targets_below
from shiradelta.hotswap.levels import Level, different, exchange, layers_of, new_levels, planned, restore
from shiradelta.hotswap.loaded import Loaded, Strengths, check_loaded, together
from shiradelta.hotswap.others import Others, leave_behind
from shiradelta.hotswap.outside import FORKED, RELOAD, Watch
from shiradelta.hotswap.ranks import Alone, Ranks
from shiradelta.hotswap.reports import SwitchReport
from shiradelta.hotswap.strengths import are_same
from shiradelta.models.live import Target

_ALONE = Alone()
#: Why a session cannot be used after `end`.
DISTRIBUTED = "the model was distributed since this HotSwap was made; make a new HotSwap"


class PatchedWeights:
    """The weights of a session, and what is on them.

    `switch` and `take_back` change weights, so they are called on a thread that no exception from outside reaches
    (`shiradelta.util.interrupts`), unless the work is only queued.  The other methods write no weights.

    Attributes:
        levels: what is on the weights; the list is replaced, never changed.
        others: the other sessions of the process.
    """

    def __init__(self, devices: Devices, watch: Watch, ranks: Ranks) -> None:
        self._devices, self._watch, self._ranks = devices, watch, ranks
        self.levels: list[Level] = []
        self._working = threading.Lock()  # of the thread that changes weights
        self._broken: str | None = None
        self._unfinished: list[Level] | None = None  # what a switch is about to put on the weights
        self.others = Others(self)

    def __del__(self) -> None:
        if self.levels:
            leave_behind(self)

    def still_patched(self) -> list[Target]:
        """The tensors that active adapters change, but for those that something else has written since."""
        return (
            sorted(self.targets.difference(self._watch.changed()), key=lambda target: target.name)
            if self.levels
            else []
        )

    @property
    def active(self) -> dict[str, float]:
        """Adapter -> strength."""
        return together(level.adapters for level in self.levels)

    @property
    def layers(self) -> Layers:
        """The layers of all levels, the topmost first."""
        return layers_of(self.levels)

    @property
    def stacks(self) -> dict[Target, Stack]:
        """The patches on each tensor, the topmost first."""
        return {target: stack for layers in self.layers.values() for target, stack in patches_on(layers).items()}

    @property
    def targets(self) -> frozenset[Target]:
        """The tensors that the active adapters change."""
        return targets_below(self.layers.values())

    @property
    def nbytes(self) -> int:
        """Memory of the saved elements."""
        return sum(layer.held.room for layers in self.layers.values() for layer in layers)

    def settle(self) -> None:
        """Waits for work whose caller did not, because two exceptions from outside came at once."""
        with self._working:
            pass

    def check_usable(self) -> None:
        """Checks that it is known what is on the weights.

        Raises:
            TargetError: it is not.
        """
        if self._unfinished is not None and self._broken is None:  # an exception came while another was handled
            self._broken = f"the weights are in an unknown state after an interrupt; {RELOAD}"
        if self._broken is not None:
            raise TargetError(self._broken)

    def forget(self) -> None:
        """Takes the weights as they are for the base."""
        self.levels, self._broken, self._unfinished = [], None, None

    def end(self, put_back: Callable[[], None]) -> None:
        """Takes everything off weights of which the model has copies elsewhere; the session cannot be used after it.

        Args:
            put_back: puts the base into the copies, wholly or not at all.
        """
        with self._working:
            self.check_usable()
            put_back()
            self.levels, self._broken = [], DISTRIBUTED

    def after_fork(self, was_used: bool) -> None:
        """Goes on in a process that was forked; `was_used` says that another thread used the session then."""
        if self._working.locked():
            self._working, was_used = threading.Lock(), True
        if was_used:
            self._broken = FORKED

    def plan(self, wanted: Strengths, adapters: Mapping[str, Loaded]) -> list[Strengths]:
        """The wanted adapters in levels.

        Raises:
            DeltaError: one is not loaded, or they cannot be active together at these strengths.
            TargetError: the weights are in an unknown state.
        """
        self.check_usable()
        check_loaded(wanted, adapters)
        return planned(wanted, adapters)

    def is_active(self, plan: Sequence[Strengths]) -> bool:
        """Whether exactly this is on the weights."""
        return are_same(together(plan), self.active)

    def report(self, adapters: Mapping[str, Loaded]) -> SwitchReport:
        """What is on the weights."""
        active = self.active
        return SwitchReport(
            active=active,
            tensors=len(self.targets),
            nonzeros=sum(adapters[name].report.nonzeros for name in active),
            nbytes=self.nbytes,
        )

    def switch(
        self, make_plan: Callable[[], Sequence[Strengths]], what: str, adapters: Mapping[str, Loaded], streams: Streams
    ) -> SwitchReport:
        """Puts what is planned on the weights, in the place of what is on them, in all processes or in none.

        Args:
            make_plan: plans it, as `plan` does.
            what: the call, for messages.
            adapters: those that are loaded.
            streams: where to queue the work.
        """
        with self._working:
            before = self.levels
            # Where others are lost, each process can still give back what it has saved itself.
            ranks: Ranks = _ALONE if self._ranks.lost and not make_plan() else self._ranks

            def reserve() -> list[Level]:
                ranks.check()
                self.check_usable()
                plan = make_plan()
                if self.is_active(plan):
                    self._watch.check()
                    return before
                return new_levels(plan, before, adapters)

            with self._devices.ordered(streams):
                self._commit(reserve, what, ranks)
            return self.report(adapters)

    def _commit(self, reserve: Callable[[], list[Level]], what: str, ranks: Ranks) -> None:
        """Writes at once, without asking the others first: they vote while the device works, and all may be undone."""
        before = after = self.levels
        wrote, error = False, None
        try:
            after = reserve()
            if after is not before:
                changing = [level.layers for levels in different(before, after) for level in levels]
                touched = different_tensors(layers for level in changing for layers in level.values())
                for held in touched:
                    held.check_memory()
                self._watch.claim()
                self._unfinished, wrote = after, True
                exchange(before, after)
                for held in touched:  # while the device works
                    held.check_model()
                increment_versions(touched)
        except BaseException as raised:
            error = raised
        try:
            ranks.decide(what, error)
        except BaseException:
            if wrote:
                self._roll_back(before, after)
                self._unfinished = None
            raise
        finally:
            error = None  # its traceback refers to this frame
            if wrote:
                self._watch.record()
        self.levels, self._unfinished = after, None

    def take_back(self, levels: list[Level], streams: Streams) -> None:
        """Undoes what a switch did until an exception from outside came: these levels are active again."""
        with self._working, self._devices.ordered(streams):
            after = self.levels if self._unfinished is None else self._unfinished
            if after is not levels and self._broken is None:
                self._roll_back(levels, after)
                self._watch.record()
                self.levels, self._unfinished = levels, None

    def _roll_back(self, before: Sequence[Level], after: list[Level]) -> None:
        """Undoes a commit that failed at any step."""
        try:
            leave, enter = different(before, after)
            restore(enter)
            for level in enter:
                level.layers.clear()  # frees its rooms, so that going back takes no more memory
            restore(leave)
            exchange([], leave)
        except BaseException as error:
            self._broken = (
                f"the weights are in an unknown state, because undoing a failed switch failed too ({error}); {RELOAD}"
            )
            raise TargetError(self._broken) from error
