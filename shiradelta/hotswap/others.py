"""Weights that other sessions of the process have patched, and that are no base of a new one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet, ref

from shiradelta.errors import TargetError
from shiradelta.hotswap.outside import reading_of
from shiradelta.models.live import Target

#: (device, first byte, byte after the last).
_Span = tuple[str, int, int]


class Patcher(Protocol):
    """What a session has on its weights."""

    def still_patched(self) -> list[Target]:
        """The tensors that active adapters change, but for those that something else has written since."""


@dataclass(frozen=True)
class _Left:
    """A tensor that a session had patched when it was deleted.

    Attributes:
        name: the tensor's name.
        owner: the model's own tensor or array, as long as it is there.
        span: its memory.
        read: reads what tells whether it was written since.
        known: what `read` gave.
    """

    name: str
    owner: ref[Any]
    span: _Span
    read: Callable[[Any], object]
    known: object

    def is_there(self) -> bool:
        """Whether the tensor is as the session left it, as far as that can be told."""
        owner = self.owner()
        return owner is not None and self.read(owner) == self.known


_lock = threading.RLock()  # of the lists; a session may be deleted at any moment, in this thread, too
_patchers: WeakSet[Any] = WeakSet()
_left: list[_Left] = []


class Others:
    """The other sessions of the process, as one session sees them."""

    def __init__(self, own: Patcher) -> None:
        self._own = ref(own)
        self._accepted: WeakSet[Any] = WeakSet()
        with _lock:
            _patchers.add(own)

    def check(self, targets: Iterable[Target]) -> None:
        """Checks that no other session has adapters on these tensors.

        Raises:
            TargetError: one has, or had when it was deleted.
        """
        with _lock:
            _left[:] = [each for each in _left if each.is_there()]
            left = [(each.name, each.span) for each in _left]
            others = [each for each in _patchers if each is not self._own() and each not in self._accepted]
        alive = [(target.name, target.memory) for other in others for target in other.still_patched()]
        if not left and not alive:
            return
        for target in targets:
            for known, what in (
                (alive, "has adapters of another HotSwap on it; revert that one first"),
                (left, "has adapters on it of a HotSwap that was deleted; load the model's weights again"),
            ):
                if any(_overlap(target.memory, span) for _, span in known):
                    raise TargetError(
                        f"tensor {target.name!r} {what}, or call rebase() to take the weights as they are now as the"
                        " base"
                    )

    def accept(self, targets: Iterable[Target]) -> None:
        """Takes these tensors as they are, whatever other sessions have on them."""
        spans = [target.memory for target in targets]
        with _lock:
            _left[:] = [each for each in _left if not any(_overlap(each.span, span) for span in spans)]
            others = [each for each in _patchers if each is not self._own()]
        self._accepted.update(other for other in others if other.still_patched())


def leave_behind(patcher: Patcher) -> None:
    """Notes what a session that is being deleted has left on its weights."""
    with suppress(Exception), _lock:  # the model may be half gone as well
        for target in patcher.still_patched():
            owner = target.now()[0]
            read = reading_of(target)
            _left.append(_Left(target.name, ref(owner), target.memory, read, read(owner)))


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _overlap(one: _Span, other: _Span) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]
