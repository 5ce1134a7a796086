"""What a service counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from jaxsft.models.weights import ModelCard

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)  # upper bounds of the histogram of latencies
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one service; those of the process (memory, processor time, files) beside them on Linux."""

    def __init__(self, card: ModelCard, step: int, batch_sizes: Sequence[int]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        model = Gauge("jaxsft_model_info", "The model that answers; always 1.", ("arch", "step"), registry=registry)
        model.labels(card.arch, str(step)).set(1)
        self.requests = Counter(
            "jaxsft_requests",
            "Requests by path and status; 499: the client went before its answer.",
            ("path", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "jaxsft_predict_seconds",
            "From the head of a request for classes to its answer, where that was 200.",
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter("jaxsft_images", "Images that the network has classified.", registry=registry)
        self.batches = Histogram(
            "jaxsft_batch_images", "Images a batch, without what fills it up.", buckets=batch_sizes, registry=registry
        )
        self.computing = Counter(
            "jaxsft_computing_seconds", "Time in which the network classified, of 1 s a second.", registry=registry
        )
        self.in_flight = Gauge("jaxsft_requests_in_flight", "Requests without an answer yet.", registry=registry)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Show what `value` returns whenever the metrics are read."""
        Gauge(f"jaxsft_{name}", meaning, registry=self._registry).set_function(value)

    def observe_batch(self, images: int, size: int, seconds: float) -> None:
        """Count a batch; as `batcher.Batcher` wants it."""
        self.images.inc(images)
        self.batches.observe(images)
        self.computing.inc(seconds)

    def text(self) -> bytes:
        """All of them, as CONTENT_TYPE."""
        return generate_latest(self._registry)
