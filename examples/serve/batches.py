"""Requests for different adapters, put together to batches for one model that holds one adapter at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import shiradelta as sd

Vectors = list[list[float]]


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
    texts: Sequence[str]
    adapter: str | None
    answer: Future[Answer] = field(default_factory=Future)


class Batcher:
    """One thread that takes what waits: the request that has waited longest, and with it others for its adapter.

    Args:
        swap: the model's session; its adapters are loaded.
        compute: texts -> vectors, with the model.
        most: texts in a batch.
    """

    def __init__(self, swap: sd.HotSwap, compute: Callable[[list[str]], Vectors], most: int = 64) -> None:
        self._swap, self._compute, self._most = swap, compute, most
        self._waiting: queue.Queue[_Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[str], adapter: str | None = None) -> Future[Answer]:
        """Queues a request.  Raises DeltaError if the adapter is not loaded."""
        if adapter is not None and adapter not in self._swap.loaded:
            raise sd.ShiraDeltaError(f"adapter {adapter!r} is not loaded; there are {sorted(self._swap.loaded)}")
        request = _Request(texts, adapter)
        self._waiting.put(request)
        return request.answer

    def close(self) -> None:
        """Ends the thread when what waits is done."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        backlog: list[_Request] = []
        more = True
        while more or backlog:
            while more and not (backlog and self._waiting.empty()):
                request = self._waiting.get()
                more = request is not None
                if request is not None:
                    backlog.append(request)
            if backlog:
                batch = self._next(backlog)
                backlog = [request for request in backlog if request not in batch]
                self._run(batch, batch[0].adapter)

    def _next(self, backlog: Sequence[_Request]) -> list[_Request]:
        """The first, and others for its adapter, as many as a batch holds."""
        batch = [backlog[0]]
        texts = len(backlog[0].texts)
        for request in backlog[1:]:
            if request.adapter == batch[0].adapter and texts + len(request.texts) <= self._most:
                batch.append(request)
                texts += len(request.texts)
        return batch

    def _run(self, batch: Sequence[_Request], adapter: str | None) -> None:
        batch = [request for request in batch if request.answer.set_running_or_notify_cancel()]
        if not batch:
            return
        texts = [text for request in batch for text in request.texts]
        try:
            start = time.perf_counter()
            self._swap.switch(adapter)
            switched = time.perf_counter()
            vectors = self._compute(texts)
            done = time.perf_counter()
        except Exception as error:
            for request in batch:
                request.answer.set_exception(error)
            return
        at = 0
        for request in batch:
            part = vectors[at : at + len(request.texts)]
            at += len(request.texts)
            switch_ms, compute_ms = 1000 * (switched - start), 1000 * (done - switched)
            request.answer.set_result(Answer(part, adapter, len(texts), switch_ms, compute_ms))
