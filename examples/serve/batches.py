"""Requests for different adapters, put together to batches for one model that holds one adapter at a time."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import shiradelta as sd
from examples.serve.limits import Limits

Vectors = list[list[float]]


class BusyError(Exception):
    """The service takes no more requests now; the same request may succeed later."""


class UnknownAdapterError(Exception):
    """There is no such adapter, or it is not loaded."""


@dataclass(frozen=True)
class Answer:
    """What one request gets.

    Attributes:
        vectors: one for each text.
        adapter: the one that was on.
        batch: texts that were computed together.
        switch_ms: what it took to put the adapter on; 0 if it was on already.
        compute_ms: what the batch took then.
    """

    vectors: Vectors
    adapter: str | None
    batch: int
    switch_ms: float
    compute_ms: float


@dataclass(frozen=True, eq=False)
class _Request:
    texts: Sequence[Any]
    adapter: str | None
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Call:
    function: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)


class Batcher:
    """One thread that owns the model: it computes what waits, and does between batches what needs the model.

    A batch is the request that has waited longest, and with it others for its adapter.  A request that fails takes no
    other with it: its batch is computed again, one request at a time.

    Args:
        swap: the model's session.
        compute: texts, as the caller prepared them -> a vector for each.
        limits: `batch` and `waiting` of them.
        observe: called with the answer of each batch, once.
    """

    def __init__(
        self,
        swap: sd.HotSwap,
        compute: Callable[[list[Any]], Vectors],
        limits: Limits | None = None,
        observe: Callable[[Answer], object] = lambda answer: None,
    ) -> None:
        self._swap, self._compute, self._observe = swap, compute, observe
        self._limits = limits or Limits()
        self._inbox: queue.Queue[_Request | _Call | None] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting, self._closed = 0, False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that wait or are computed now."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, texts: Sequence[Any], adapter: str | None = None) -> Future[Answer]:
        """Queues a request.  A future that is cancelled in time costs nothing.

        Raises:
            UnknownAdapterError: the adapter is not loaded.
            BusyError: too many texts wait, or the service stops.
        """
        if adapter is not None and adapter not in self._swap.loaded:
            raise UnknownAdapterError(adapter)
        with self._lock:
            if self._closed:
                raise BusyError("the service stops")
            if self._waiting + len(texts) > self._limits.waiting:
                raise BusyError(f"{self._waiting} texts wait already")
            self._waiting += len(texts)
            request = _Request(texts, adapter)
            request.answer.add_done_callback(lambda _: self._done(len(texts)))
            self._inbox.put(request)
        return request.answer

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Calls a function between two batches, when nothing else uses the model.

        Raises:
            BusyError: the service stops.
        """
        call = _Call(function)
        with self._lock:
            if self._closed:
                raise BusyError("the service stops")
            self._inbox.put(call)
        return call.answer

    def close(self) -> None:
        """Takes no more requests, and waits until those that wait are answered."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _done(self, texts: int) -> None:
        with self._lock:
            self._waiting -= texts

    def _work(self) -> None:
        backlog: list[_Request] = []
        more = True
        while more or backlog:
            while more and not (backlog and self._inbox.empty()):
                came = self._inbox.get()
                more = came is not None
                if isinstance(came, _Request):
                    backlog.append(came)
                elif came is not None and came.answer.set_running_or_notify_cancel():
                    _settle(came.answer, came.function)
            if backlog:
                batch = self._next(backlog)
                taken = set(batch)
                backlog = [request for request in backlog if request not in taken]
                self._run([request for request in batch if request.answer.set_running_or_notify_cancel()])

    def _next(self, backlog: Sequence[_Request]) -> list[_Request]:
        """The first, and others for its adapter, as many as a batch holds."""
        batch = [backlog[0]]
        texts = len(backlog[0].texts)
        for request in backlog[1:]:
            if request.adapter == batch[0].adapter and texts + len(request.texts) <= self._limits.batch:
                batch.append(request)
                texts += len(request.texts)
        return batch

    def _run(self, batch: Sequence[_Request]) -> None:
        if not batch:
            return
        try:
            answers = self._answers(batch)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    self._run([request])
            else:
                batch[0].answer.set_exception(error)
            return
        self._observe(answers[0])
        for request, answer in zip(batch, answers, strict=True):
            request.answer.set_result(answer)

    def _answers(self, batch: Sequence[_Request]) -> list[Answer]:
        adapter, texts = batch[0].adapter, [text for request in batch for text in request.texts]
        if adapter is not None and adapter not in self._swap.loaded:
            raise UnknownAdapterError(adapter)  # it was evicted since
        start = time.perf_counter()
        self._swap.switch(adapter)
        switched = time.perf_counter()
        vectors = self._compute(texts)
        done = time.perf_counter()
        if len(vectors) != len(texts) or not all(math.isfinite(x) for vector in vectors for x in vector):
            raise ArithmeticError(f"the model with adapter {adapter!r} gives NaN or infinity")
        answers = []
        for request in batch:
            part, vectors = vectors[: len(request.texts)], vectors[len(request.texts) :]
            answers.append(Answer(part, adapter, len(texts), 1000 * (switched - start), 1000 * (done - switched)))
        return answers


def _settle(answer: Future[Any], function: Callable[[], Any]) -> None:
    try:
        answer.set_result(function())
    except Exception as error:
        answer.set_exception(error)
