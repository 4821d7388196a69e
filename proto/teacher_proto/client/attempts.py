"""One call to a pool of replicas, attempt by attempt, until every record has arrived or an error ends it.

`call.py` decides which errors end a call; `exchange.py` makes a single attempt. Used by `replica_client.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Generic

import httpx

from teacher_proto.client.call import Call, ClientStats, Death, Lanes
from teacher_proto.client.exchange import InfoT, Route, broke_off, exchange, fetch_status
from teacher_proto.client.replicas import Replica, ReplicaPool, RetryBudget, RetryPolicy, Timing
from teacher_proto.client.waiting import InFlight
from teacher_proto.errors import EngineDeadError, StillhouseError, TeacherUnavailableError, WireError, WrongTeacherError
from teacher_proto.request_checks import RequestT
from teacher_proto.wire.responses import Progress, RecordT

# Requests of other clients that run beside a suspect would be blamed if it kills the engine. Wait this long for them.
WAIT_FOR_OTHERS_S = 10.0


def timeouts(policy: RetryPolicy, read_s: float) -> httpx.Timeout:
    """Timeouts of one exchange that may be silent for `read_s`."""
    return httpx.Timeout(read_s, connect=min(policy.connect_timeout_s, read_s))


class Attempts(Generic[RequestT, RecordT, InfoT]):
    """What the calls of one client share. `check_addressee(fingerprint, info, url)` raises if the fingerprint that a
    request names is not that of the replica at `url`.
    """

    def __init__(
        self, http: httpx.AsyncClient, pool: ReplicaPool[InfoT], route: Route[RequestT, Any, RecordT, InfoT],
        policy: RetryPolicy, timing: Timing, stats: ClientStats, in_flight: InFlight,
        check_addressee: Callable[[str, InfoT, str], None],
    ):  # fmt: skip
        self._http, self._pool, self._route = http, pool, route
        self._policy, self._timing, self._stats, self._in_flight = policy, timing, stats, in_flight
        self._check_addressee = check_addressee
        self._budget = RetryBudget(policy, timing)
        self._lanes = Lanes()
        self._deaths = self._deaths_staggered = 0
        self._slots = asyncio.Semaphore(policy.max_in_flight * len(pool.replicas))

    async def records(
        self, call: Call[RequestT], tell: Callable[[], None]
    ) -> AsyncGenerator[tuple[int, RecordT], None]:
        """Yield (index, record) for a request that a service admits in one piece. `tell` is called on progress."""
        async with self._slots:
            call.start()
            ranked = self._pool.ranked(call.key)
            self._budget.note_call()
            self._stats.calls += 1
            while call.missing:
                replica = await self._pool.acquire(ranked, call.tried, call.deadline)
                if call.failed and replica in call.tried:
                    await self._pause(call)
                    replica = await self._pool.acquire(ranked, call.tried, call.deadline)
                alone, held_at = call.suspected, self._timing.now()
                async with self._lanes.enter(alone=alone):
                    if alone:
                        await self._until_alone(replica)
                    call.waited(self._timing.now() - held_at)
                    asked, began_at = call.begin(replica), self._timing.now()
                    try:
                        async with aclosing(self._attempt(call, replica, asked, tell)) as answers:
                            async for index, targets in answers:
                                yield index, targets
                        call.end(failed=False)
                    except StillhouseError as error:
                        death = await self._death(replica, error, began_at)
                        if death is not None:
                            self._deaths += 1
                            call.died(replica, death, error, asked, alone)
                        self._after_failure(call, replica, error, asked)
                        call.end(failed=True)

    async def _attempt(
        self, call: Call[RequestT], replica: Replica[InfoT], asked: list[int], tell: Callable[[], None]
    ) -> AsyncGenerator[tuple[int, RecordT], None]:
        """Request these sequences from one replica. The error of a sequence is raised after the records of the others;
        of several errors, the first that cannot be retried, or else the last."""
        info = replica.info
        assert info is not None, "a replica that passed its probe has info"
        if call.request.fingerprint is not None:
            self._check_addressee(call.request.fingerprint, info, replica.url)
        request = call.request.select(asked).model_copy(update={"fingerprint": info.fingerprint})
        self._route.check_request(request, info)
        self._stats.attempts += 1
        failure: StillhouseError | None = None
        timeout = timeouts(
            self._policy, min(self._policy.read_timeout_s * replica.patience, max(call.remaining_s, 0.001))
        )

        def on_progress(progress: Progress) -> None:
            call.reported(progress)
            tell()

        outcomes = exchange(
            self._http, replica.url, self._route, request, info, timeout, lambda size: self._on_chunk(call, size),
            on_progress,
        )  # fmt: skip
        async with aclosing(outcomes):
            async for place, outcome in outcomes:
                if isinstance(outcome, StillhouseError):
                    failure = failure if failure is not None and not failure.retryable else outcome
                    continue
                call.answered(asked[place])
                replica.answered()
                self._in_flight.answered(len(request.sequences[place]))
                self._pool.succeeded(replica)
                yield asked[place], outcome
        if failure is not None:
            raise failure

    def _after_failure(
        self, call: Call[RequestT], replica: Replica[InfoT], error: StillhouseError, asked: list[int]
    ) -> None:
        """Record the failure on the replica and the call; raises if it ends the call."""
        self._stats.count(error)
        hangs = isinstance(error.__cause__, httpx.ReadTimeout)
        if hangs:
            replica.was_silent(len(asked), call.tokens_of(asked))
        if isinstance(error, (WrongTeacherError, EngineDeadError)) or hangs:
            # Don't wait for `open_after` failures: with a replica that hangs, each costs a whole read timeout, and a
            # probe tells sooner. A process whose engine is dead still responds until it exits.
            replica.last_error = error
            self._pool.open(replica)
        elif isinstance(error, (TeacherUnavailableError, WireError)):
            self._pool.failed(replica, error)
        elif error.status in (429, 503):
            self._pool.busy(replica, error, call.attempts)
        call.judge(replica, error, asked)

    async def _death(self, replica: Replica[InfoT], error: StillhouseError, began_at: float) -> Death | None:
        """How the engine died during the attempt that began at `began_at` and ended with `error`; None if it didn't."""
        if isinstance(error, EngineDeadError):
            return "died"
        if not broke_off(error):
            return None
        status = await fetch_status(self._http, replica.url, timeouts(self._policy, self._policy.connect_timeout_s))
        return "vanished" if status.gone or status.uptime_s < self._timing.now() - began_at else None

    async def _until_alone(self, replica: Replica[InfoT]) -> None:
        """Wait, for a bounded time, until the replica has finished other clients' requests, so that none of those is
        blamed."""
        if self._deaths > self._deaths_staggered:
            # Clients that saw the same engine die should not all start at once.
            self._deaths_staggered = self._deaths
            await self._timing.sleep(self._timing.random.uniform(0.0, 1.0))
        end = self._timing.now() + WAIT_FOR_OTHERS_S
        while self._timing.now() < end:
            status = await fetch_status(self._http, replica.url, timeouts(self._policy, self._policy.connect_timeout_s))
            if not status.requests_inside:
                return
            await self._timing.sleep(0.5)

    async def _pause(self, call: Call[RequestT]) -> None:
        """Before the call is repeated to a replica: back off, then wait until the retry budget allows it."""
        delay = self._timing.full_jitter(call.attempts - 1, self._policy.backoff_base_s, self._policy.backoff_cap_s)
        await self._timing.sleep(min(delay, max(call.remaining_s, 0.0)))
        while (wait_s := self._budget.wait_s()) > 0 and call.remaining_s > 0:
            self._stats.budget_waits += 1
            pace = self._timing.random.uniform(0.5, 1.0) * self._policy.backoff_cap_s
            await self._timing.sleep(min(wait_s, pace, call.remaining_s))

    def _on_chunk(self, call: Call[RequestT], size: int) -> None:
        self._stats.bytes_received += size
        call.heard()
        if call.remaining_s <= 0:
            raise TeacherUnavailableError(
                f"the response was still arriving after {call.deadline_s:g} s without progress"
            )
