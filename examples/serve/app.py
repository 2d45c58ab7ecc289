"""The service's routes.  See README.md beside this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

import shiradelta as sd
from examples.serve.adapters import Adapters
from examples.serve.batches import Answer, Batcher, BusyError, UnknownAdapterError, Vectors
from examples.serve.guard import Guard
from examples.serve.limits import Limits
from examples.serve.metrics import Metrics


class Question(BaseModel):
    """Texts, and the adapter to embed them with; null for the base."""

    texts: list[str]
    adapter: str | None = None


def make_app(
    swap: sd.HotSwap,
    compute: Callable[[list[Any]], Vectors],
    tokenize: Callable[[list[str]], list[Any]] = list,
    adapters: Adapters | None = None,
    limits: Limits | None = None,
    key: str | None = None,
) -> FastAPI:
    """The service over a model's session.

    Args:
        swap: the session.
        compute: what `tokenize` returned for some texts -> a vector for each.
        tokenize: prepares a request's texts, apart from the others'; raises ValueError for one that cannot be.
        adapters: where adapters are loaded from; by default from nowhere.
        limits: how much the service takes.
        key: the API key.
    """
    limits = limits or Limits()
    metrics, known = Metrics(), adapters or Adapters(swap, None, limits)

    def observe(batch: Answer) -> None:
        metrics.observe(batch)
        if batch.adapter is not None:
            known.use(batch.adapter)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = batcher = Batcher(swap, compute, limits, observe)
        metrics.gauge("serve_waiting_texts", "Texts that wait or are computed.", lambda: batcher.waiting)
        metrics.gauge("serve_adapters", "Adapters in memory.", lambda: len(swap.loaded))
        yield
        await asyncio.to_thread(batcher.close)  # what waits is answered

    app = FastAPI(title="Adapters of one model", lifespan=running)
    app.add_middleware(Guard, limits=limits, metrics=metrics, key=key)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """Says where and what, without the input: that may be long, or no text at all."""
        found = [{"loc": list(map(str, one["loc"]))[:4], "msg": one["msg"][:200]} for one in error.errors()[:3]]
        return JSONResponse({"detail": found}, 422)

    @app.post("/embed")
    async def embed(question: Question) -> Answer:
        _check(question, limits)
        try:
            async with asyncio.timeout(limits.seconds):
                prepared = await asyncio.to_thread(tokenize, question.texts)
                future = app.state.batcher.submit(prepared, question.adapter)
                answer: Answer = await asyncio.wrap_future(future)
        except Exception as error:
            raise _refusal(error, question.adapter) from None
        return answer

    @app.get("/adapters")
    def list_adapters() -> dict[str, Any]:
        loaded = {name: {"nonzeros": one.nonzeros, "bytes": one.nbytes} for name, one in swap.loaded.items()}
        return {"loaded": loaded, "active": swap.active, "available": known.available()}

    @app.put("/adapters/{name}")
    async def load(name: str) -> dict[str, int]:
        report = await between_batches(lambda: known.load(name), name)
        return {"nonzeros": report.nonzeros, "bytes": report.nbytes}

    @app.delete("/adapters/{name}", status_code=204)
    async def evict(name: str) -> None:
        await between_batches(lambda: known.evict(name), name)

    async def between_batches(function: Callable[[], Any], name: str) -> Any:
        try:
            async with asyncio.timeout(limits.seconds):
                return await asyncio.wrap_future(app.state.batcher.call(function))
        except Exception as error:
            raise _refusal(error, name) from None

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health/live")
    def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/health/ready")
    def ready() -> dict[str, bool]:
        if not app.state.batcher.alive:
            raise HTTPException(503, "the service stops, or its thread has ended")
        return {"ready": True}

    return app


def _check(question: Question, limits: Limits) -> None:
    if not 1 <= len(question.texts) <= limits.texts:
        raise HTTPException(422, f"give 1 to {limits.texts} texts, not {len(question.texts)}")
    for number, text in enumerate(question.texts):
        if len(text) > limits.characters:
            raise HTTPException(422, f"text {number} has {len(text):,} characters, more than {limits.characters:,}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise HTTPException(422, f"text {number} has half a character in it (a lone surrogate)")


def _refusal(error: Exception, adapter: str | None) -> HTTPException:
    """The answer to a request that failed: what the caller can do something about, or a plain 500."""
    match error:
        case BusyError():
            return HTTPException(503, f"{error}; try again later", {"Retry-After": "1"})
        case TimeoutError():
            return HTTPException(504, "it took too long; try again, with fewer texts")
        case UnknownAdapterError():
            return HTTPException(404, f"there is no adapter {str(adapter)[:80]!r}; GET /adapters lists them")
        case sd.ShiraDeltaError() | MemoryError():
            return HTTPException(409, f"adapter {adapter!r} cannot be used: {str(error)[:300]}")
        case ValueError():
            return HTTPException(422, str(error)[:300])
    return HTTPException(500, f"{type(error).__name__}: the texts could not be embedded")
