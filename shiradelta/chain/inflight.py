"""Answers that are being made while weights change: each is made by one version, and says which.

A step waits until no answer is being made; what comes meanwhile waits for the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.util.arguments import NUMBER, TEXT, checked
from shiradelta.util.registry import Registry


@dataclass(frozen=True)
class Policy:
    """What becomes of the answers that are being made when a step comes.

    Attributes:
        name: what a user calls it.
        aborts: whether they are told to end.
    """

    name: str
    aborts: bool


#: There is none that lets an answer go on under other weights.
POLICIES = Registry("policy for answers in flight", (Policy("finish", False), Policy("abort", True)))


@dataclass(eq=False)
class Answer:
    """An answer that is being made, or was.

    Attributes:
        version: the version of the chain that makes it.
        aborted: whether it is to end now, since a step waits; look at it between tokens.
    """

    version: int
    aborted: bool = False


class InFlight:
    """Keeps answers and steps apart, in one process.

    Args:
        policy: "finish" lets answers end by themselves, "abort" tells them to.
        seconds: how long a step waits for them; then it is not applied.

    Raises:
        ArgumentError: there is no such policy, or the time is less than none.

    Attributes:
        version: the version that is on the weights.
    """

    @checked(policy=TEXT, seconds=NUMBER)
    def __init__(self, policy: str = "finish", seconds: float = 600.0) -> None:
        if not seconds >= 0:
            raise ArgumentError(f"seconds is {seconds}; give 0 or more")
        self._policy, self._seconds = POLICIES.find(policy), float(seconds)
        self._changed = Condition()
        self._answers: set[Answer] = set()
        self._held = False
        self.version = 0

    @contextmanager
    def answer(self) -> Iterator[Answer]:
        """A context in which the weights stay as they are; waits while a step is applied."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            made = Answer(self.version)
            self._answers.add(made)
        try:
            yield made
        finally:
            with self._changed:
                self._answers.remove(made)
                self._changed.notify_all()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no answer is made; the follower's.

        Raises:
            TargetError: answers did not end in time; the block does not begin.
        """
        with self._changed:
            end = time.monotonic() + self._seconds
            if not self._changed.wait_for(lambda: not self._held, self._seconds):
                raise TargetError("another step is being applied; wait for it", ending="the weights are as before")
            self._held = True
            for each in self._answers:
                each.aborted = self._policy.aborts
            if not self._changed.wait_for(lambda: not self._answers, max(0.0, end - time.monotonic())):
                self._held = False
                self._changed.notify_all()
                raise TargetError(
                    f"{len(self._answers)} answers are still being made after {self._seconds:g} s; wait, or abort them",
                    ending="the weights are as before",
                )
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()
