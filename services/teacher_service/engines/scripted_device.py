"""A simulated device with a fixed rate in tokens per second, for the scripted engine: one job at a time, in steps.

Jobs run in order of arrival, urgent ones first; those wait for the end of a step, as they would for a forward pass.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

_STEP_S = 0.05


@dataclass(order=True)
class _Work:
    later: bool
    number: int
    tokens: int = field(compare=False)
    count: Callable[[int], None] = field(compare=False)
    done: asyncio.Future[None] = field(compare=False)


class ScriptedDevice:
    """All methods run in the event loop's thread. While `stuck`, no step ends."""

    def __init__(self, tokens_per_second: float):
        self.stuck = False
        self._rate = tokens_per_second
        self._step = max(1, int(tokens_per_second * _STEP_S))
        self._queue: list[_Work] = []
        self._numbers = itertools.count()
        self._running: asyncio.Task[None] | None = None

    async def compute(self, tokens: int, urgent: bool, count: Callable[[int], None]) -> None:
        """Return once these tokens are computed; `count` is called with those of each step. Cancelled work stops."""
        done = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, _Work(not urgent, next(self._numbers), tokens, count, done))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._queue:
            work = self._queue[0]
            if work.done.done():
                heapq.heappop(self._queue)
                continue
            step = min(self._step, work.tokens)
            # Steps are due by the rate alone, so that a late wake-up does not lower it.
            due = max(due + step / self._rate, loop.time() - _STEP_S)
            await asyncio.sleep(due - loop.time())
            if self.stuck:
                await asyncio.Event().wait()
            if work.done.done():
                continue
            work.count(step)
            work.tokens -= step
            if not work.tokens:
                work.done.set_result(None)
