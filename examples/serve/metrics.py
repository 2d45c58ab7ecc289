"""What the service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from examples.serve.batches import Answer

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHORT = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("serve_requests", "Answered requests.", ["status"], registry=self.registry)
        self.seconds = Histogram("serve_request_seconds", "From request to answer.", registry=self.registry)
        self._texts = Histogram("serve_batch_texts", "Texts of a batch.", buckets=_SIZES, registry=self.registry)
        self._switch = Histogram(
            "serve_switch_seconds", "Putting an adapter on.", buckets=_SHORT, registry=self.registry
        )
        self._compute = Histogram("serve_compute_seconds", "Computing a batch.", registry=self.registry)

    def observe(self, batch: Answer) -> None:
        """Counts a batch."""
        self._texts.observe(batch.batch)
        self._switch.observe(batch.switch_ms / 1000)
        self._compute.observe(batch.compute_ms / 1000)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Adds a figure that is read when it is asked for."""
        Gauge(name, help, registry=self.registry).set_function(read)
