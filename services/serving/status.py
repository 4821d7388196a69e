"""The data behind the status page: who is using the teacher, how fast, and where the targets came from. `service.py`
keeps a `History`, `http/routes.py` serves it as `/v1/status`, and `http/pages/status.html` draws it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from prometheus_client import Counter
from pydantic import BaseModel

from serving.metrics import Metrics

STEP_S = 2.0
_SAMPLES = 150
_RECENT_SAMPLES = 5


class Client(BaseModel):
    """One client: totals since the start, `tokens_per_second` and `share` over the last ten seconds."""

    name: str
    tokens: int
    tokens_per_second: float
    share: float
    requests: int
    rejected: int
    cancelled: int
    held_cost: int
    idle_s: float | None


class Curves(BaseModel):
    """The last five minutes, one value every `step_s`, oldest first."""

    tokens_per_second: list[float]
    queue_tokens: list[int]


class StatusBody(BaseModel):
    """The body of `GET /v1/status`. `used` is the fraction of the capacity in use."""

    model: str
    dtype: str
    quantization: str | None
    engine: str
    device: str
    fingerprint: str
    state: Literal["loading", "ready", "draining", "dead"]
    keys: bool
    uptime_s: float
    step_s: float
    tokens_per_second: float
    history: Curves
    queue_tokens: int
    engine_tokens: int
    window: int
    requests_inside: int
    used: float
    sources: dict[str, int]
    rejected: dict[str, int]
    clients: list[Client]


@dataclass(frozen=True)
class Sample:
    """Totals at one moment: tokens served by client, and tokens waiting."""

    at: float
    tokens: dict[str, int]
    queue_tokens: int


def totals(counter: Counter, label: str) -> dict[str, int]:
    """A counter's values summed by one of its labels."""
    sums: Tally[str] = Tally()
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                sums[sample.labels[label]] += int(sample.value)
    return dict(sums)


class History:
    """Five minutes of samples, one every two seconds, so that a page has a curve as soon as it opens."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self._born = time.monotonic()
        self._last_seen: dict[str, float] = {}

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._born

    def take(self, queue_tokens: int) -> None:
        now, tokens = time.monotonic(), totals(self._metrics.tokens, "client")
        before = self._samples[-1].tokens if self._samples else {}
        for client, total in tokens.items():
            if total != before.get(client, 0):
                self._last_seen[client] = now
        self._samples.append(Sample(now, tokens, queue_tokens))

    async def keep(self, queue_tokens: Callable[[], int]) -> None:
        """Take a sample every two seconds, forever; `queue_tokens()` is called each time."""
        while True:
            self.take(queue_tokens())
            await asyncio.sleep(STEP_S)

    def curves(self) -> Curves:
        rates = [round(sum(_rates(older, newer).values()), 1) for older, newer in pairwise(self._samples)]
        return Curves(tokens_per_second=rates, queue_tokens=[sample.queue_tokens for sample in self._samples])

    def recent(self) -> dict[str, float]:
        """Tokens per second of each client over the last ten seconds."""
        if len(self._samples) < 2:
            return {}
        return _rates(self._samples[max(-len(self._samples), -1 - _RECENT_SAMPLES)], self._samples[-1])

    def clients(self, held: dict[str, int]) -> list[Client]:
        """Every client that has sent a request, the busiest over the last ten seconds first."""
        metrics, recent, now = self._metrics, self.recent(), time.monotonic()
        tokens, rejected = totals(metrics.tokens, "client"), totals(metrics.rejected, "client")
        requests, cancelled = totals(metrics.requests, "client"), totals(metrics.cancelled, "client")
        rate = sum(recent.values())
        rows = [
            Client(
                name=name,
                tokens=tokens.get(name, 0),
                tokens_per_second=round(recent.get(name, 0.0), 1),
                share=round(recent.get(name, 0.0) / rate, 4) if rate else 0.0,
                requests=requests[name],
                rejected=rejected.get(name, 0),
                cancelled=cancelled.get(name, 0),
                held_cost=held.get(name, 0),
                idle_s=round(now - self._last_seen[name], 1) if name in self._last_seen else None,
            )
            for name in requests
            if name
        ]
        return sorted(rows, key=lambda row: (-row.tokens_per_second, -row.tokens, row.name))


def _rates(older: Sample, newer: Sample) -> dict[str, float]:
    seconds = newer.at - older.at
    return {name: (total - older.tokens.get(name, 0)) / seconds for name, total in newer.tokens.items()}
