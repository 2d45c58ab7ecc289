"""How much the service takes, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of the service.

    Attributes:
        connections: open connections.
        body: bytes of a request.
        texts: texts of a request.
        characters: characters of a text; longer ones are refused before they are cut into tokens.
        tokens: tokens of a text; more are cut off, as the model's own limit does.
        batch: texts that are computed together.
        waiting: texts that may wait; more are refused until some are done.
        seconds: from a request to its answer.
        adapters: adapters in memory; the one that was used least recently makes room for the next.
        adapter_bytes: their memory.
    """

    connections: int = 256
    body: int = 1 << 20
    texts: int = 64
    characters: int = 20_000
    tokens: int = 512
    batch: int = 64
    waiting: int = 1024
    seconds: float = 30.0
    adapters: int = 32
    adapter_bytes: int = 1 << 30
