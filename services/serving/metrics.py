"""Prometheus counters and histograms of a service; its gauges are added in `service.py`. Updated by the HTTP layer and
the coalescer.

Each service object has its own registry, so that tests can have several in one process. Label values are route
templates, names of keys, sources and error codes, never text from a client.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.http.context import Exchange

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)
_METHODS = {"GET", "HEAD", "POST", "OPTIONS"}


class Metrics:
    """Counters of requests, tokens by source, failures, bytes, and seconds in the queue, the engine and encoding."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Finished requests", "route", "method", "status", "client")
        self.request_seconds = Histogram(
            "stillhouse_request_seconds", "Seconds from the headers to the last byte", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = self._counter("tokens", "Tokens of returned sequences", "client", "source")
        self.sequences = self._counter("sequences", "Sequences returned", "client", "source")
        self.rejected = self._counter("rejected", "Requests refused or failed", "client", "reason")
        self.cancelled = self._counter("cancelled", "Requests whose client disconnected", "client")
        self.failed = self._counter("failed_sequences", "Sequences that failed", "client", "reason")
        self.bytes_out = self._counter("bytes_out", "Bytes of responses", "route", "client")
        self.queue_seconds = self._counter("queue_seconds", "Seconds spent waiting for the engine", "client")
        self.engine_seconds = self._counter("engine_seconds", "Seconds in the engine", "client")
        self.engine_sequences = self._counter("engine_sequences", "Sequences sent to the engine", "client")
        self.engine_aborted = self._counter("engine_aborted", "Sequences aborted in the engine", "client")
        self.outlived = self._counter(
            "outlived", "Sequences computed after all their clients had disconnected", "client"
        )
        self.encode_seconds = self._counter("encode_seconds", "Seconds spent encoding responses", "client")
        self.out_of_memory = self._counter("engine_out_of_memory", "Times that the engine ran out of memory")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"stillhouse_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, read: object) -> None:
        """Add a gauge that calls `read` at each scrape."""
        Gauge(f"stillhouse_{name}", text, registry=self.registry).set_function(read)  # type: ignore[arg-type]

    def observe(self, exchange: Exchange) -> None:
        """Count a finished request."""
        method = exchange.method if exchange.method in _METHODS else "other"
        self.requests.labels(exchange.route, method, str(exchange.status), exchange.client).inc()
        self.request_seconds.labels(exchange.route).observe(exchange.seconds)
        self.bytes_out.labels(exchange.route, exchange.client).inc(exchange.bytes_out)
        if exchange.reason == "disconnect":
            self.cancelled.labels(exchange.client).inc()
        elif exchange.reason:
            self.rejected.labels(exchange.client, exchange.reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
