"""The example service's batches: which requests go together, what fails alone, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

import shiradelta as sd
from examples.serve.batches import Answer, Batcher, BusyError, UnknownAdapterError
from examples.serve.limits import Limits

Session = tuple[sd.HotSwap, torch.Tensor]


class Gate:
    """A computation that waits until it is let through."""

    def __init__(self, compute: Callable[[list[str]], list[list[float]]] = lambda texts: [[1.0]] * len(texts)) -> None:
        self.begun, self.go_on, self.compute = threading.Event(), threading.Event(), compute

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.begun.set()
        assert self.go_on.wait(20)
        return self.compute(texts)


def test_requests_are_grouped_by_adapter(session: Session):
    swap, weight = session
    sizes: list[int] = []

    def compute(texts: list[str]) -> list[list[float]]:
        sizes.append(len(texts))
        return [[float(weight[0, 0]), float(len(text))] for text in texts]

    observed: list[Answer] = []
    batcher = Batcher(swap, compute, Limits(batch=4), observed.append)
    wanted = ["add1", "add2", None] * 6
    futures = [batcher.submit(["x" * i], name) for i, name in enumerate(wanted)]
    batcher.close()
    answers = [future.result() for future in futures]
    expected = {"add1": 1.0, "add2": 2.0, None: 0.0}
    assert [answer.vectors for answer in answers] == [[[expected[n], float(i)]] for i, n in enumerate(wanted)]
    assert max(sizes) <= 4
    assert len(sizes) < len(wanted)
    assert [answer.batch for answer in observed] == sizes
    with pytest.raises(BusyError, match="stops"):
        batcher.submit(["x"])


def test_an_adapter_that_is_not_loaded_is_refused_at_once(session: Session):
    batcher = Batcher(session[0], lambda texts: [[1.0]])
    with pytest.raises(UnknownAdapterError):
        batcher.submit(["x"], "other")
    batcher.close()


def test_a_request_that_was_given_up_does_not_stop_the_others(session: Session):
    gate = Gate()
    batcher = Batcher(session[0], gate)
    first = batcher.submit(["a"])
    gate.begun.wait(10)
    given_up, last = batcher.submit(["b"]), batcher.submit(["c"])
    assert given_up.cancel()
    assert not first.cancel()
    gate.go_on.set()
    assert last.result(10).batch == 1
    assert first.result(10).batch == 1
    batcher.close()
    assert batcher.waiting == 0


def waiting_together(batcher: Batcher, gate: Gate, *texts: list[str]) -> list[Future[Answer]]:
    """Requests that wait while a first one is computed, so that they get into one batch."""
    batcher.submit(["first"])
    gate.begun.wait(10)
    futures = [batcher.submit(some) for some in texts]
    gate.go_on.set()
    return futures


@pytest.mark.parametrize("bad", ["raises", "nan", "short"])
def test_a_bad_request_fails_alone(session: Session, bad: str):
    def compute(texts: list[str]) -> list[list[float]]:
        if "bad" in texts and bad == "raises":
            raise ValueError("no")
        vectors = [[float("nan") if text == "bad" and bad == "nan" else 1.0] for text in texts]
        return vectors[:-1] if "bad" in texts and bad == "short" else vectors

    gate = Gate(compute)
    batcher = Batcher(session[0], gate)
    before, failing, after = waiting_together(batcher, gate, ["a", "b"], ["bad"], ["c"])
    assert before.result(10).vectors == [[1.0], [1.0]]
    assert after.result(10).vectors == [[1.0]]
    with pytest.raises((ValueError, ArithmeticError)):
        failing.result(10)
    batcher.close()
    assert batcher.waiting == 0


def test_too_many_waiting_texts_are_refused(session: Session):
    gate = Gate()
    batcher = Batcher(session[0], gate, Limits(waiting=3))
    first = batcher.submit(["a"])
    gate.begun.wait(10)
    second = batcher.submit(["b", "c"])
    with pytest.raises(BusyError, match="3 texts wait already"):
        batcher.submit(["d"])
    gate.go_on.set()
    first.result(10), second.result(10)
    assert batcher.submit(["d"]).result(10).batch == 1
    batcher.close()


def test_functions_are_called_between_batches(session: Session):
    swap, weight = session
    batcher = Batcher(swap, lambda texts: [[float(weight[0, 0])]])
    assert batcher.submit(["a"], "add1").result(10).vectors == [[1.0]]
    thread = batcher.call(threading.current_thread).result(10)
    assert thread is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 // 0).result(10)
    assert batcher.submit(["a"], "add2").result(10).vectors == [[2.0]]
    batcher.close()
    with pytest.raises(BusyError):
        batcher.call(print)
    assert not batcher.alive


def test_an_adapter_that_goes_while_a_request_waits(session: Session):
    gate = Gate()
    batcher = Batcher(session[0], gate)
    batcher.submit(["a"])
    gate.begun.wait(10)
    unloaded = batcher.call(lambda: session[0].unload("add1"))
    late = batcher.submit(["b"], "add1")
    gate.go_on.set()
    unloaded.result(10)
    with pytest.raises(UnknownAdapterError):
        late.result(10)
    batcher.close()
