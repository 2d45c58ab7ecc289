"""Answers while a live model follows a chain: each is made by one version, which it names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

import shiradelta as sd
from shiradelta.chain import InFlight, LiveFollower
from tests.chain.test_chain import Run
from tests.chain.test_follow import viewed


class Live:
    """A live model that follows a run, with a policy."""

    def __init__(self, run: Run, policy: str = "finish", seconds: float = 30.0) -> None:
        self.run = run
        model = run.models[0]
        self.weights = {
            name: viewed(model, name, bits.copy()).reshape(shape) for name, (_, shape, bits) in model.items()
        }
        self.gate = InFlight(policy, seconds)
        self.swap = sd.HotSwap(self.weights)
        self.follower = LiveFollower(run.chain, self.swap, 0, in_flight=self.gate)

    def is_version(self, number: int) -> bool:
        model = self.run.models[number]
        return all(each.tobytes() == model[name][2].tobytes() for name, each in self.weights.items())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 3)


def started(work: Callable[[], object]) -> Thread:
    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_answer_finishes_before_the_weights_change(run: Run):
    live = Live(run)
    with live.gate.answer() as answer:
        thread = started(lambda: live.follower.follow(1))
        thread.join(0.1)
        assert thread.is_alive()
        assert live.is_version(0)
        assert (answer.version, answer.aborted) == (0, False)
        late: list[int] = []

        def ask() -> None:
            with live.gate.answer() as other:
                late.append(other.version)

        waiting = started(ask)  # it comes while a step waits, and gets the next version
        waiting.join(0.1)
        assert waiting.is_alive()
    thread.join(10)
    waiting.join(10)
    assert late == [1]
    assert live.is_version(1)
    assert answer.version == 0  # it can be asked afterwards


def test_an_answer_is_told_to_end(run: Run):
    live, ended = Live(run, "abort"), Event()

    def generate() -> None:
        with live.gate.answer() as answer:
            ended.set()
            while not answer.aborted:
                time.sleep(0.001)
            assert live.is_version(0)

    thread = started(generate)
    assert ended.wait(10)
    live.follower.follow()
    thread.join(10)
    assert live.is_version(3)
    assert live.gate.version == 3


def test_a_mixture_is_refused():
    with pytest.raises(sd.ArgumentError, match="finish, abort"):
        InFlight("mix")


def test_a_step_that_waits_too_long_is_not_applied(run: Run):
    live = Live(run, seconds=0.05)
    with live.gate.answer():
        with pytest.raises(sd.TargetError, match="1 answers are still being made"):
            live.follower.follow()
        assert live.is_version(0)
    with live.gate.answer() as answer:  # it is open again
        assert answer.version == 0
    live.follower.follow()
    assert live.is_version(3)


def test_going_back_waits_too(run: Run):
    live = Live(run, seconds=0.05)
    live.follower.follow()
    with live.gate.answer() as answer:
        assert answer.version == 3
        with pytest.raises(sd.TargetError):
            live.follower.follow(2)
        assert live.is_version(3)
    live.follower.follow(2)
    with live.gate.answer() as answer:
        assert answer.version == 2
    assert live.is_version(2)


def test_a_step_that_is_refused_lets_answers_go_on(run: Run):
    live = Live(run)
    live.follower.follow(1)
    next(iter(live.weights.values())).reshape(-1)[:] = 0  # something else has written the weights
    with pytest.raises(sd.ShiraDeltaError):
        live.follower.follow()
    with live.gate.answer() as answer:
        assert answer.version == live.follower.version == 1


@pytest.mark.parametrize("policy", ["finish", "abort"])
def test_no_answer_sees_two_versions(run: Run, policy: str):
    """Answers in three threads look at all weights many times while the model goes back and forth."""
    live, stop = Live(run, policy), Event()
    wrong: list[str] = []
    seen: set[int] = set()

    def generate() -> None:
        while not stop.is_set():
            with live.gate.answer() as answer:
                for _ in range(5):
                    if answer.aborted:
                        break
                    if not live.is_version(answer.version):
                        wrong.append(f"version {answer.version}")
                    time.sleep(0)
                seen.add(answer.version)

    threads = [started(generate) for _ in range(3)]
    for to in (1, 2, 3, 2, 3, 2, 3):
        live.follower.follow(to)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not wrong
    assert seen <= {0, 1, 2, 3}
