"""The service's routes, and the model behind them.  See README.md beside this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

import shiradelta as sd
from examples.serve.batches import Answer, Batcher, Vectors


class Question(BaseModel):
    """Texts, and the adapter to embed them with; null for the base."""

    texts: list[str]
    adapter: str | None = None


def open_model(folder: Path, device: str) -> tuple[Any, Callable[[list[str]], Vectors]]:
    """(a model of sentence embeddings, texts -> unit vectors)."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval().to(device)

    @torch.inference_mode()
    def embed(texts: list[str]) -> Vectors:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=1).tolist()
        return vectors

    return model, embed


def make_app(swap: sd.HotSwap, compute: Callable[[list[str]], Vectors]) -> FastAPI:
    """The service over a session whose adapters are loaded."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(swap, compute)
        yield
        app.state.batcher.close()

    app = FastAPI(title="Adapters of one model", lifespan=running)

    @app.post("/embed")
    async def embed(question: Question) -> Answer:
        try:
            answer: Answer = await asyncio.wrap_future(app.state.batcher.submit(question.texts, question.adapter))
        except sd.ShiraDeltaError as error:
            raise HTTPException(404, str(error)) from None
        return answer

    @app.get("/adapters")
    def adapters() -> dict[str, Any]:
        return {
            "loaded": {name: {"nonzeros": r.nonzeros, "bytes": r.nbytes} for name, r in swap.loaded.items()},
            "active": swap.active,
        }

    return app
