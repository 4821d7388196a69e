"""The replicas of one teacher: their order of preference, a circuit breaker for each, waiting for an available one, and
retries: the policy, full-jitter backoff and a retry budget.

`replica_client.py` owns a `ReplicaPool` and gives it the probe that closes a circuit. Circuits start open: the first
probe is the connect. Times are in seconds, on a monotonic clock that tests replace.
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
    """Timeouts, backoff and retry limits of a client.

    `deadline_s` is how long one call with all its retries may go without progress, that is, without a record or a
    progress report with fewer tokens left. `read_timeout_s` is the longest silence within a response; a service that
    is working reports progress every few seconds. At most `max_in_flight` requests per replica are sent at a time; the
    others wait in the client. A replica's circuit opens after `open_after` failures in a row or one read timeout, and
    the backoff between its probes is at most `probe_cap_s`.
    A call is repeated to a replica after a full-jitter backoff, and only while repeats within the last minute are fewer
    than `budget_ratio` of the calls, or than `budget_floor`. `max_wire_errors` attempts with bytes that are not the
    wire format end a call: something on the way rewrites them.
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
    """A client's clock and random numbers."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: random.Random = field(default_factory=random.Random)

    def full_jitter(self, attempt: int, base_s: float, cap_s: float) -> float:
        """Uniform between 0 and `base * 2**attempt`, capped (Brooker, "Exponential backoff and jitter", AWS 2015)."""
        # Clients that failed together are spread over the whole interval, instead of all returning at its end.
        return self.random.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt, 32)))


class RetryBudget:
    """Limits repeats by the calls of the last minute, so that many clients do not overrun a teacher that restarts."""

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
        """0 if a repeat was within the budget, which it is then charged to; otherwise the time until one may be."""
        self._forget()
        # By default a tenth of the calls, so that repeats add at most 10 % to the load of a struggling teacher; the
        # floor allows some to a client that has made few calls yet.
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
    """One teacher process behind a URL, and what this client knows about it.

    `refused` is set when retrying is pointless until somebody acts: the wrong teacher, an unknown key.
    `max_tokens` limits the tokens of a request, None for no limit, and `patience` multiplies the read timeout. Both are
    learnt from the silences of a service that does not report progress.
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
        """Nothing came within the read timeout. A service that reports progress hangs, and nothing is changed. An older
        one may have needed longer: halve the tokens per request, or for a single sequence double the timeout."""
        if self.info is None or self.info.limits.max_cost is not None:
            return
        if sequences > 1:
            self.max_tokens = max(1, tokens // 2)
        else:
            self.patience *= 2

    def answered(self) -> None:
        """A record came in time: allow a little more per request."""
        if self.max_tokens is not None:
            self.max_tokens += max(1, self.max_tokens // 10)

    def __repr__(self) -> str:
        return f"Replica({self.url}, {'open' if self.is_open else 'closed'}, {self.failures} failures)"


class ReplicaPool(Generic[InfoT]):
    """`acquire` returns a replica that is available now, or waits for one; the caller reports how it went.

    `probe(replica)` returns if the replica is the expected teacher and works, and raises otherwise.
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
        """Rendezvous order for `key`: equal keys go to the same replica first, and so to the same target store."""
        return sorted(self.replicas, key=lambda r: hashlib.sha256(key + r.url.encode()).digest())

    async def acquire(
        self, ranked: Sequence[Replica[InfoT]], tried: Collection[Replica[InfoT]], deadline: float
    ) -> Replica[InfoT]:
        """The first of `ranked` that is available now, untried ones before `tried`.

        Waits for a probe to succeed or a Retry-After to pass. TeacherUnavailableError at `deadline`, with the last
        error of each replica; the error of a `refused` replica at once.
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
        """Probe every open replica once, now. Errors are kept on the replicas."""
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
        """Send nothing to the replica until a probe has passed."""
        replica.is_open = True
        replica.failed_probes = 0
        replica.ready_at = self._timing.now()

    def busy(self, replica: Replica[InfoT], error: StillhouseError, attempt: int) -> None:
        """Leave the replica alone for its Retry-After plus jitter, so that clients do not all return at once."""
        replica.last_error = error
        asked = min(error.retry_after or 0.0, self._policy.max_retry_after_s)
        jitter = self._timing.full_jitter(attempt, self._policy.backoff_base_s, self._policy.backoff_cap_s)
        replica.ready_at = self._timing.now() + asked + jitter

    def unavailable(self, waited_s: float) -> TeacherUnavailableError:
        """The error to raise at a deadline: each replica with its last error."""
        heard = [(replica.url, str(replica.last_error or "no response yet")) for replica in self.replicas]
        reasons = [text if url in text else f"{url}: {text}" for url, text in heard]
        return TeacherUnavailableError(
            f"no {self._noun} was available within {waited_s:.1f} s: " + "; ".join(reasons),
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
            asked = min(error.retry_after or 0.0, self._policy.max_retry_after_s)
            replica.ready_at = self._timing.now() + max(jitter, asked)

    def _collect_probes(self) -> None:
        """Drop finished probes. An exception that is no StillhouseError is a bug of ours, and is raised here."""
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
    """The root URLs, stripped and checked: http or https, with a host, none twice. ValueError otherwise."""
    roots = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not roots:
        raise ValueError(f"no {noun} URL given, expected one like http://localhost:8000")
    for root in roots:
        try:
            url = httpx.URL(root)
        except httpx.InvalidURL as error:
            raise ValueError(f"{noun} URL {root!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"{noun} URL {root!r}: expected http://HOST:PORT or https://HOST")
    if len(set(roots)) != len(roots):
        raise ValueError(f"the same {noun} URL is given twice: {', '.join(roots)}")
    return roots
