"""Whether the engine makes progress with its work. Kept by a service; used by its readiness probe.

An engine is ready if it finished something recently, or if its current work may take that long at the measured rate. A
silent engine gets a one-token probe that skips all queues: if that returns, the engine is slow but not stuck.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from serving.scheduling.coalescer import Coalescer
from serving.scheduling.fair import FairQueue, Rate
from teacher_proto.errors import OverloadedError, StillhouseError

log = structlog.get_logger("stillhouse.readiness")
_FRESH_S = 1.0
_LOOK_EVERY_S = 1.0
# Wait no longer than this for an idle engine: the prober has a timeout of its own.
_IDLE_S = 10.0
# Work may take this many times as long as the rate predicts.
_SLOWER = 3.0


class Readiness:
    """`probe` runs one token through the engine; `within_s` is how long a busy engine may be silent."""

    def __init__(
        self, probe: Callable[[], Awaitable[None]], coalescer: Coalescer[Any, Any], queue: FairQueue, rate: Rate,
        within_s: float,
    ):  # fmt: skip
        self._run_probe = probe
        self._coalescer = coalescer
        self._queue = queue
        self._rate = rate
        self._within_s = within_s
        self._probe: asyncio.Task[None] | None = None
        self._busy_since: float | None = None

    async def watch(self) -> None:
        """Look every second, forever; probe an engine that has been silent for half of the allowed time."""
        while True:
            now = time.monotonic()
            if not self._queue.running:
                self._busy_since = None
            elif self._busy_since is None:
                self._busy_since = now
            if self._silent_s(now) > self._allowed_s() / 2:
                self._start_probe()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def check(self) -> None:
        """Return if the engine makes progress. OverloadedError if it is stuck, the probe's own error if that fails."""
        now = time.monotonic()
        if now - self._coalescer.last_success < _FRESH_S:
            return
        if self._queue.running:
            silent_s = self._silent_s(now)
            if silent_s <= self._allowed_s():
                return
            raise OverloadedError(f"the engine is stuck: it has work, but finished nothing for {silent_s:.0f} s")
        within_s = min(self._within_s, _IDLE_S)
        try:
            await asyncio.wait_for(asyncio.shield(self._start_probe()), within_s)
        except TimeoutError:
            raise OverloadedError(f"the engine did not finish a probe of one token in {within_s:g} s") from None

    def _silent_s(self, now: float) -> float:
        """Seconds since the engine last finished anything; 0 if it has no work."""
        if not self._queue.running or self._busy_since is None:
            return 0.0
        return now - max(self._busy_since, self._coalescer.last_success)

    def _allowed_s(self) -> float:
        rate = self._rate.tokens_per_second
        return max(self._within_s, _SLOWER * self._queue.running / rate if rate else 0.0)

    def _start_probe(self) -> asyncio.Task[None]:
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._succeed())
            self._probe.add_done_callback(_note_failure)
        return self._probe

    async def _succeed(self) -> None:
        await self._run_probe()
        self._coalescer.last_success = time.monotonic()


def _note_failure(probe: asyncio.Task[None]) -> None:
    if not probe.cancelled() and isinstance(error := probe.exception(), StillhouseError):
        log.warning("probe failed", reason=error.message)
