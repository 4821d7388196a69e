"""The replicas of one teacher: which to ask first, a circuit breaker for each, waiting until one can be asked, and when
one may be asked again: the policy's figures, full-jitter backoff, and a budget for retries.

`replica_client.py` owns a `ReplicaPool` and gives it the probe that closes a circuit. A circuit is open at first: the
first probe is the connect. Times in seconds, on a monotonic clock that tests replace.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic

import httpx

from teacher_proto.client.exchange import InfoT
from teacher_proto.errors import StillhouseError, TeacherUnavailableError


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


class Replica(Generic[InfoT]):
    """One teacher process behind a URL, and what this client knows of it.

    `refused` is set where asking again is pointless until somebody acts: the wrong teacher, a key it does not know.
    `max_tokens` are those to ask about at a time, None where nothing speaks against a whole request, and `patience` the
    times over that it may be silent: learnt of one that does not report progress.
    """

    def __init__(self, url: str):
        self.url = url
        self.info: InfoT | None = None
        self.is_open = True
        self.ready_at = 0.0
        self.failures = 0
        self.failed_probes = 0
        self.last_error: StillhouseError | None = None
        self.refused: StillhouseError | None = None
        self.probe: asyncio.Task[None] | None = None
        self.max_tokens: int | None = None
        self.patience = 1

    def was_silent(self, sequences: int, tokens: int) -> None:
        """It said nothing for the whole read timeout. One that would report progress hangs; an older one may have been
        asked for more than it computes in that time: it is asked for half as much, or given twice the time for one."""
        if self.info is None or self.info.limits.max_cost is not None:
            return
        if sequences > 1:
            self.max_tokens = max(1, tokens // 2)
        else:
            self.patience *= 2

    def answered(self) -> None:
        """It gave a record in time: it may be asked for a little more at a time."""
        if self.max_tokens is not None:
            self.max_tokens += max(1, self.max_tokens // 10)

    def __repr__(self) -> str:
        return f"Replica({self.url}, {'open' if self.is_open else 'closed'}, {self.failures} failures)"


class ReplicaPool(Generic[InfoT]):
    """`acquire` hands out a replica that can be asked now, or waits; the caller reports how it went.

    `probe(replica)` returns if the replica is the teacher that is wanted and works, and raises otherwise.
    """

    def __init__(
        self, urls: Sequence[str], probe: Callable[[Replica[InfoT]], Awaitable[None]], policy: RetryPolicy,
        timing: Timing, noun: str = "teacher",
    ):  # fmt: skip
        self.replicas: list[Replica[InfoT]] = [Replica(url) for url in urls]
        self.down_since: float | None = None
        self._probe = probe
        self._policy = policy
        self._timing = timing
        self._noun = noun

    def ranked(self, key: bytes) -> list[Replica[InfoT]]:
        """Rendezvous order for `key`: equal keys meet the same replica first, and its target store."""
        return sorted(self.replicas, key=lambda r: hashlib.sha256(key + r.url.encode()).digest())

    async def acquire(
        self, ranked: Sequence[Replica[InfoT]], tried: Collection[Replica[InfoT]], deadline: float
    ) -> Replica[InfoT]:
        """The first of `ranked` that can be asked now, untried ones before `tried`.

        Waits for a probe to succeed or a Retry-After to pass. TeacherUnavailableError at `deadline`, with what was
        tried; the replica's own error where one of them was refused for good.
        """
        started = self._timing.now()
        order = sorted(ranked, key=lambda r: r in tried)
        while True:
            now = self._timing.now()
            for replica in order:
                if replica.refused is not None:
                    raise replica.refused
            self._collect_probes()
            self._start_due_probes(now)
            for replica in order:
                if not replica.is_open and replica.ready_at <= now:
                    self.down_since = None
                    return replica
            if self.down_since is None:
                self.down_since = now
            if now >= deadline:
                raise self.unavailable(now - started)
            await self._wait(now, deadline)

    async def probe_all(self) -> None:
        """Probe every open replica once, now. Their errors stay with them."""
        self._start_due_probes(float("inf"))
        probes = [replica.probe for replica in self.replicas if replica.probe is not None]
        if probes:
            await asyncio.wait(probes)
        self._collect_probes()

    def succeeded(self, replica: Replica[InfoT]) -> None:
        replica.failures = 0
        self.down_since = None

    def failed(self, replica: Replica[InfoT], error: StillhouseError) -> None:
        """One failed exchange; the circuit opens after `open_after` in a row."""
        replica.last_error = error
        replica.failures += 1
        if replica.failures >= self._policy.open_after:
            self.open(replica)

    def open(self, replica: Replica[InfoT]) -> None:
        """Ask nothing of the replica until a probe has passed."""
        replica.is_open = True
        replica.failed_probes = 0
        replica.ready_at = self._timing.now()

    def busy(self, replica: Replica[InfoT], error: StillhouseError, attempt: int) -> None:
        """Leave the replica alone for its Retry-After and a jitter, so that those who wait do not come back at once."""
        replica.last_error = error
        asked = min(error.retry_after or 0.0, self._policy.max_retry_after_s)
        jitter = self._timing.full_jitter(attempt, self._policy.backoff_base_s, self._policy.backoff_cap_s)
        replica.ready_at = self._timing.now() + asked + jitter

    def unavailable(self, waited_s: float) -> TeacherUnavailableError:
        """What to raise when patience ends: each replica with the last that was heard of it."""
        heard = [(replica.url, str(replica.last_error or "no answer yet")) for replica in self.replicas]
        reasons = [text if url in text else f"{url}: {text}" for url, text in heard]
        return TeacherUnavailableError(
            f"no {self._noun} could be asked within {waited_s:.1f} s. " + "; ".join(reasons),
            retry_after=next((r.last_error.retry_after for r in self.replicas if r.last_error), None),
        )

    async def close(self) -> None:
        probes = [replica.probe for replica in self.replicas if replica.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _start_due_probes(self, now: float) -> None:
        for replica in self.replicas:
            if replica.is_open and replica.refused is None and replica.probe is None and replica.ready_at <= now:
                replica.probe = asyncio.create_task(self._run_probe(replica))

    async def _run_probe(self, replica: Replica[InfoT]) -> None:
        try:
            await self._probe(replica)
            replica.is_open = False
            replica.failures = replica.failed_probes = 0
            replica.last_error = None
        except StillhouseError as error:
            replica.last_error = error
            if not error.retryable:
                replica.refused = error
            jitter = self._timing.full_jitter(
                replica.failed_probes, self._policy.backoff_base_s, self._policy.probe_cap_s
            )
            replica.failed_probes += 1
            replica.ready_at = self._timing.now() + max(jitter, error.retry_after or 0.0)

    def _collect_probes(self) -> None:
        """Let go of probes that ended; one that met what is nobody's fault but ours raises it here."""
        for replica in self.replicas:
            if replica.probe is not None and replica.probe.done():
                probe, replica.probe = replica.probe, None
                probe.result()

    async def _wait(self, now: float, deadline: float) -> None:
        """Until a probe ends, a replica is due, or the deadline has come."""
        due = [replica.ready_at for replica in self.replicas if replica.probe is None]
        pause = asyncio.ensure_future(self._timing.sleep(max(min([*due, deadline]) - now, 0.001)))
        probes = [replica.probe for replica in self.replicas if replica.probe is not None]
        try:
            await asyncio.wait([pause, *probes], return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()


def check_urls(urls: str | Sequence[str], noun: str) -> list[str]:
    """The replicas' roots, checked: http or https, a host, once each."""
    roots = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not roots:
        raise ValueError(f"no {noun} URL was given; one like http://localhost:8000 is expected")
    for root in roots:
        try:
            url = httpx.URL(root)
        except httpx.InvalidURL as error:
            raise ValueError(f"{noun} URL {root!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"{noun} URL {root!r}: http://HOST:PORT or https://HOST is expected")
    if len(set(roots)) != len(roots):
        raise ValueError(f"a {noun} URL is given twice: {', '.join(roots)}")
    return roots
