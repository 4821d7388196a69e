"""When a client asks again: the policy's figures, full-jitter backoff, and a budget for retries.

`teacher_client.py` and `replicas.py` keep to it. Times in seconds, on a monotonic clock that tests replace.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RetryPolicy:
    """How patient a client is.

    `deadline_s` is how long one call with all its retries may go without progress: no record, and no report of the
    service by which fewer tokens are left. `read_timeout_s` is the longest silence inside an answer; a service that
    works says so every few seconds. `max_in_flight` requests are with a replica at a time, the others wait here.
    A replica's circuit opens after `open_after` failures in a row, or one silence, and is probed at most every
    `probe_cap_s`.
    A replica hears a call a second time after a full-jitter backoff, and only while such repeats within the last
    minute stay below `budget_ratio` of the calls or below `budget_floor`. `max_wire_errors` attempts whose bytes
    were not the wire's end a call: something between the two rewrites it.
    """

    deadline_s: float = 300.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    probe_timeout_s: float = 10.0
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 10.0
    probe_cap_s: float = 2.0
    max_retry_after_s: float = 60.0
    open_after: int = 3
    budget_ratio: float = 0.1
    budget_floor: int = 10
    max_wire_errors: int = 4
    max_in_flight: int = 32


@dataclass
class Timing:
    """Where a client's time and chance come from."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: random.Random = field(default_factory=random.Random)

    def full_jitter(self, attempt: int, base_s: float, cap_s: float) -> float:
        """Uniform between 0 and `base * 2**attempt`, capped (Brooker, "Exponential backoff and jitter", AWS 2015)."""
        # Full jitter: clients that failed together come back spread over the whole interval, not all at its end.
        return self.random.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt, 32)))


class RetryBudget:
    """Counts calls and repeats of the last minute, so that many students do not storm a teacher that comes back."""

    WINDOW_S = 60.0

    def __init__(self, policy: RetryPolicy, timing: Timing):
        self._policy = policy
        self._now = timing.now
        self._calls: deque[float] = deque()
        self._repeats: deque[float] = deque()

    def note_call(self) -> None:
        self._forget()
        self._calls.append(self._now())

    def wait_s(self) -> float:
        """0 where a repeat is within the budget and has been taken from it; else the time until one may be."""
        self._forget()
        # A tenth of the calls by default, so that repeats add at most 10 % to the load of a teacher in trouble; the
        # floor lets a client that has just started, with few calls, repeat at all.
        allowed = max(self._policy.budget_floor, int(self._policy.budget_ratio * len(self._calls)))
        if len(self._repeats) < allowed:
            self._repeats.append(self._now())
            return 0.0
        # Until the oldest repeat is a minute old and falls out of the count.
        return max(self._repeats[0] + self.WINDOW_S - self._now(), 0.001) if self._repeats else self.WINDOW_S

    def _forget(self) -> None:
        horizon = self._now() - self.WINDOW_S
        for times in (self._calls, self._repeats):
            while times and times[0] <= horizon:
                times.popleft()
