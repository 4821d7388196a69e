"""The path of one sequence through the service: store lookup, coalescing, a fair turn, scoring.

A sequence that is requested while an identical one is in flight waits for that one, which is computed as soon as one of
the clients that want it gets a turn. When the last of them has left, it is dropped if it is still queued; once begun in
the engine, it is finished, and the result is kept for a repeated request, bounded in bytes and time. Results that were
delivered also stay available for a while: the latest `RECENT_BYTES` of them or, with a store, until the store has them.

A `fresh` job is computed even if a result is available: it tests what the model computes now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from serving.engine import Job, QueryT, RecordT
from serving.metrics import Metrics
from serving.scheduling.fair import FairQueue, Rate, Ticket
from serving.scheduling.kept import Kept
from teacher_proto.errors import EngineDeadError, EngineMemoryError, StillhouseError

log = structlog.get_logger("stillhouse.coalescer")
_SETTLING_S = 1.0
RECENT_BYTES = 64 * 2**20
_IN_FLIGHT_BYTES = 4096  # memory of a finished sequence besides its result
# The engine is given what it computes in this time, and at least `_LEAST_PACE` tokens, which bounds the wait of control
# traffic. An engine that computes `_STEP_TOKENS` (a step of vLLM on a CPU) in that time is given the whole window: its
# own steps bound the wait.
_PACE_S = 1.5
_LEAST_PACE = 256  # a step has a fixed cost
_STEP_TOKENS = 2048
StoredQueryT = TypeVar("StoredQueryT", contravariant=True)


@dataclass(eq=False)
class InFlight(Generic[RecordT]):
    """A sequence that is being or was computed, how many wait for it, and the timer that ends it if nobody does."""

    ticket: Ticket
    task: asyncio.Task[RecordT]
    clients: set[str]
    waiters: int = 0
    stored: bool = False
    given_up: asyncio.TimerHandle | None = None


class RecordStore(Protocol[StoredQueryT, RecordT]):
    """Where results are stored and looked up."""

    async def get(self, query: StoredQueryT) -> RecordT | None: ...

    def put(self, query: StoredQueryT, answer: RecordT) -> bool:
        """Whether `get` will find it, after a moment."""
        ...


class Coalescer(Generic[QueryT, RecordT]):
    """Turns jobs into results by an engine's `score`. Every method runs in the event loop's thread.

    Results that nobody waits for are kept for `keep_s`, in at most `keep_bytes`.
    """

    def __init__(
        self, score: Callable[[Job[QueryT]], Awaitable[RecordT]], queue: FairQueue, rate: Rate, metrics: Metrics,
        on_death: Callable[[EngineDeadError], None], store: RecordStore[QueryT, RecordT] | None = None,
        *, keep_s: float = 600.0, keep_bytes: int = 256 * 2**20,
    ):  # fmt: skip
        self._engine_score = score
        self._queue = queue
        self._rate = rate
        self._metrics = metrics
        self._on_death = on_death
        self._store = store
        self._keep_s = keep_s
        self._in_flight: dict[Hashable, InFlight[RecordT]] = {}
        self._fresh: set[asyncio.Task[RecordT]] = set()
        self._recent = Kept(RECENT_BYTES, keep_s, self._forget_key)
        self._unread = Kept(keep_bytes, keep_s, self._forget_key)
        self._aborted: StillhouseError | None = None
        self._draining = False
        self.last_success = 0.0
        queue.pace = _LEAST_PACE

    @property
    def in_flight(self) -> int:
        return sum(not one.task.done() for one in self._in_flight.values()) + len(self._fresh)

    @property
    def unread_bytes(self) -> int:
        """Bytes of results that were computed after every client that wanted them had left."""
        return self._unread.nbytes

    def tokens_ahead(self, keys: Collection[Hashable]) -> int:
        """Tokens of other sequences that are computed before the last of these; all, if none of these is in flight."""
        tickets = [one.ticket for key in keys if (one := self._in_flight.get(key)) is not None]
        return self._queue.tokens_ahead(tickets) if tickets or not keys else self._queue.tokens_in_all()

    async def answer(self, job: Job[QueryT], client: str) -> RecordT:
        """The result of an admitted job. EngineError if the engine failed on it."""
        self._check_open()
        if job.fresh:
            return await self._answer_fresh(job, client)
        if self._store is not None and job.query.key not in self._in_flight:
            stored = await self._store.get(job.query)
            if stored is not None:
                self._count(job, client, "store")
                return stored
            self._check_open()
        one, source = self._join(job, client)
        one.waiters += 1
        try:
            # Shielded: a client that leaves cancels its own wait, not the work that others wait for too.
            answer = await asyncio.shield(one.task)
        except asyncio.CancelledError:
            if one.task.cancelled() and self._aborted is not None:
                raise self._aborted from None
            raise
        finally:
            one.waiters -= 1
            if not one.waiters and not one.task.done():
                self._left(one, client)
        self._count(job, client, source)
        return answer

    def _left(self, one: InFlight[RecordT], client: str) -> None:
        """Nobody waits for it any more: drop it if it is queued or the service drains, else give it `keep_s`."""
        if one.ticket.waiting or self._draining:
            one.task.cancel()
            return
        self._metrics.outlived.labels(client).inc()
        one.given_up = asyncio.get_running_loop().call_later(self._keep_s, one.task.cancel)

    async def _answer_fresh(self, job: Job[QueryT], client: str) -> RecordT:
        ticket = Ticket(job.query.num_tokens)
        task = asyncio.create_task(self._score(job, client, ticket))
        self._fresh.add(task)
        task.add_done_callback(self._fresh.discard)
        task.add_done_callback(lambda _: self._queue.leave(ticket))
        if job.urgent:
            self._queue.rush(ticket)
        else:
            self._queue.join(client, ticket)
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self._aborted is not None:
                raise self._aborted from None
            task.cancel()
            raise
        self._count(job, client, "engine")
        return answer

    def _check_open(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    def _count(self, job: Job[QueryT], client: str, source: str) -> None:
        self._metrics.tokens.labels(client, source).inc(job.query.num_tokens)
        self._metrics.sequences.labels(client, source).inc()

    def drain(self) -> None:
        """Clients will not retry here: cancel what nobody waits for, now and later."""
        self._draining = True
        for one in list(self._in_flight.values()):
            if not one.waiters:
                one.task.cancel()

    def abort(self, error: StillhouseError) -> None:
        """Cancel everything in flight; those who wait for it get `error`."""
        self._aborted = error
        for task in [*(one.task for one in self._in_flight.values()), *self._fresh]:
            task.cancel()

    def _join(self, job: Job[QueryT], client: str) -> tuple[InFlight[RecordT], str]:
        """The entry for a job, and `coalesced` if it existed before, else `engine`."""
        key = job.query.key
        one = self._in_flight.get(key)
        if one is not None and not one.task.cancelling():
            if one.given_up is not None:
                # Requested again in time: stop the timer that would have cancelled it.
                one.given_up.cancel()
                one.given_up = None
            if key in self._unread:
                self._unread.discard(key)
                self._recent.add(key, one.task.result().nbytes + _IN_FLIGHT_BYTES)
            # Queued in the lane of each client that wants it; whichever comes up first serves it.
            if client not in one.clients and one.ticket.waiting:
                one.clients.add(client)
                self._queue.join(client, one.ticket)
            return one, "coalesced"
        ticket = Ticket(job.query.num_tokens)
        task = asyncio.create_task(self._score(job, client, ticket))
        one = self._in_flight[key] = InFlight(ticket, task, {client})
        task.add_done_callback(lambda _: self._finished(key, one))
        self._queue.join(client, ticket)
        return one, "engine"

    def _finished(self, key: Hashable, one: InFlight[RecordT]) -> None:
        self._queue.leave(one.ticket)
        if one.given_up is not None:
            one.given_up.cancel()
        # Read the exception even if all who waited have left; those who have not raise it too.
        if one.task.cancelled() or one.task.exception() is not None:
            self._forget(key, one)
        elif one.stored:
            # The store has it from now on; until it is on disk, requests find it here.
            asyncio.get_running_loop().call_later(_SETTLING_S, self._forget, key, one)
        else:
            kept = self._recent if one.waiters else self._unread
            kept.add(key, one.task.result().nbytes + _IN_FLIGHT_BYTES)

    def _forget(self, key: Hashable, one: InFlight[RecordT]) -> None:
        if self._in_flight.get(key) is one:
            del self._in_flight[key]

    def _forget_key(self, key: Hashable) -> None:
        self._in_flight.pop(key, None)

    async def _score(self, job: Job[QueryT], client: str, ticket: Ticket) -> RecordT:
        queued = time.monotonic()
        async with self._queue.turn(ticket):
            started = time.monotonic()
            self._metrics.queue_seconds.labels(client).inc(started - queued)
            self._metrics.engine_sequences.labels(client).inc()
            try:
                answer = await self._engine_score(job)
            except asyncio.CancelledError:
                self._metrics.engine_aborted.labels(client).inc()
                raise
            except EngineDeadError as error:
                self._on_death(error)
                raise
            except EngineMemoryError:
                self._queue.halve(ticket)
                self._metrics.out_of_memory.inc()
                log.warning("engine out of memory", tokens=job.query.num_tokens, window=self._queue.window)
                raise
            finally:
                self._metrics.engine_seconds.labels(client).inc(time.monotonic() - started)
        if self._store is not None and not job.fresh:
            self._in_flight[job.query.key].stored = self._store.put(job.query, answer)
        # After a success only: the rate is that of finished work, and the pace follows the rate.
        self._queue.recover()
        self.last_success = time.monotonic()
        self._rate.count(job.query.num_tokens, self._queue.busy_s())
        self._queue.pace = self._pace()
        return answer

    def _pace(self) -> int:
        tokens = int(_PACE_S * self._rate.tokens_per_second)
        return self._queue.window if tokens >= _STEP_TOKENS else max(_LEAST_PACE, tokens)
