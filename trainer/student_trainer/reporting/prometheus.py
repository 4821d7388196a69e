"""Serves a run's metrics to Prometheus at `http://HOST:PORT/metrics`. Opened by `trackers` if `logging.prometheus_port`
is set.

The metrics are those of `metrics.jsonl` and `evaluation.jsonl`, with their latest values: Prometheus keeps the history.
Names of terms, sources and groups become labels. deploy/grafana and deploy/prometheus use these metrics.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

PREFIX = "stillhouse_train_"
# Key in a step's line -> metric and its help text.
GAUGES = {
    "loss": ("loss", "The loss that was differentiated, nats per token"),
    "learning_rate": ("learning_rate", "Learning rate of the first group of parameters"),
    "grad_norm": ("grad_norm", "Gradient norm before clipping"),
    "seconds": ("step_seconds", "Duration of the last step"),
    "tokens_per_second": ("tokens_per_second", "Tokens trained on per second in the last step"),
    "wait_share": ("wait_share", "Share of the last step's time that it waited for targets"),
    "prefetch_depth": ("prefetch_depth", "Batches requested ahead"),
}
# First part of a key -> metric, its help text, and labels for the rest of the key, which is split at "/".
LABELLED = {
    "loss": ("term_loss", "Mean of a loss term, nats per token", ("term",)),
    "weighted": ("term_weighted", "A loss term's share of the loss", ("term",)),
    "source": ("source", "Metrics of a step, by data source", ("source", "figure")),
    "mixture": ("mixture_weight", "Weight with which the last batch was drawn, if a policy changes it", ("source",)),
    "held_out": ("held_out", "The last evaluation, by source", ("source", "figure")),
}


class Exporter:
    """A tracker's sink that is read over HTTP. ValueError if the port can't be opened."""

    def __init__(self, host: str, port: int, run_id: str, steps: int):
        registry = CollectorRegistry()
        self._gauges = {key: Gauge(PREFIX + name, text, registry=registry) for key, (name, text) in GAUGES.items()}
        self._labelled = {
            key: Gauge(PREFIX + name, text, labels, registry=registry) for key, (name, text, labels) in LABELLED.items()
        }
        self._step = Gauge(PREFIX + "step", "Updates made", registry=registry)
        self._last = Gauge(PREFIX + "last_step_timestamp_seconds", "When the last step ended", registry=registry)
        self._tokens = Counter(PREFIX + "tokens", "Tokens trained on by this process", registry=registry)
        self._waited = Counter(PREFIX + "wait_seconds", "Seconds waited for targets", registry=registry)
        Gauge(PREFIX + "steps", "Updates that the run will make", ("run",), registry=registry).labels(run_id).set(steps)
        self._tokens_before: float | None = None
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ValueError(f"logging.prometheus_port: can't listen on {host}:{port}: {error.strerror}") from None

    @property
    def port(self) -> int:
        return self._server.server_port

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        for key, value in figures.items():
            if value is None or isinstance(value, str):
                continue
            first, _, rest = key.partition("/")
            if key in self._gauges:
                self._gauges[key].set(value)
            elif rest and first in self._labelled:
                # Source names may contain slashes, metric names don't.
                labels = rest.rsplit("/", 1) if len(LABELLED[first][2]) == 2 else [rest]
                self._labelled[first].labels(*labels).set(value)
        if "seconds" in figures:
            self._count(step, figures)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _count(self, step: int, figures: Mapping[str, Any]) -> None:
        """Update the counters. A resumed run's token count includes earlier processes, so only increases are added."""
        tokens = figures["tokens"]
        if self._tokens_before is not None:
            self._tokens.inc(tokens - self._tokens_before)
        self._tokens_before = tokens
        self._waited.inc(figures["wait_s"])
        self._step.set(step)
        self._last.set(time.time())
