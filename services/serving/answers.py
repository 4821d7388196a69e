"""The road of one sequence inside the service: look into the store, coalesce, wait for a fair turn, score, check.

Sequences that are asked for while an identical one is on its way wait for that one. It goes when the first of those
who want it gets a turn, and is aborted when the last of them has left. An answer stays at hand for those who come a
little later: in memory, the latest `RECENT_BYTES` of them, or where there is a store until it is found there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from serving.admission import RetryAfter
from serving.engine import AnswerT, JobT
from serving.fair import FairQueue, Ticket
from serving.metrics import Metrics
from teacher_proto.errors import EngineDeadError, EngineMemoryError, StillhouseError

log = structlog.get_logger("stillhouse.answers")
_SETTLING_S = 1.0
RECENT_BYTES = 64 * 2**20
_FLIGHT_BYTES = 4096  # what a finished flight takes beside its answer
StoredJobT = TypeVar("StoredJobT", contravariant=True)


@dataclass(eq=False)
class _Flight(Generic[AnswerT]):
    """A sequence on its way through the engine, and how many wait for it."""

    ticket: Ticket
    task: asyncio.Task[AnswerT]
    students: set[str]
    waiters: int = 0


class AnswerStore(Protocol[StoredJobT, AnswerT]):
    """Where answers are kept and found again."""

    async def get(self, job: StoredJobT) -> AnswerT | None: ...

    def put(self, job: StoredJobT, answer: AnswerT) -> None: ...


class Answers(Generic[JobT, AnswerT]):
    """Turns jobs into answers by an engine's `score`. Every method runs in the event loop's thread.

    `check` raises an EngineError for an answer that only a broken model computes.
    """

    def __init__(
        self, score: Callable[[JobT], Awaitable[AnswerT]], check: Callable[[JobT, AnswerT], None],
        queue: FairQueue, rate: RetryAfter, metrics: Metrics,
        on_death: Callable[[EngineDeadError], None], store: AnswerStore[JobT, AnswerT] | None = None,
    ):  # fmt: skip
        self._engine_score = score
        self._check_answer = check
        self._queue = queue
        self._rate = rate
        self._metrics = metrics
        self._on_death = on_death
        self._store = store
        self._flights: dict[Hashable, _Flight[AnswerT]] = {}
        self._recent: deque[tuple[Hashable, _Flight[AnswerT]]] = deque()
        self._recent_bytes = 0
        self._aborted: StillhouseError | None = None
        self.last_success = 0.0

    @property
    def in_flight(self) -> int:
        return sum(not flight.task.done() for flight in self._flights.values())

    async def answer(self, job: JobT, student: str) -> AnswerT:
        """The answer to a job that was admitted. EngineError if the engine failed at it."""
        self._check_open()
        if self._store is not None and job.key not in self._flights:
            stored = await self._store.get(job)
            if stored is not None:
                self._count(job, student, "store")
                return stored
            self._check_open()
        flight, source = self._board(job, student)
        flight.waiters += 1
        try:
            answer = await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled() and self._aborted is not None:
                raise self._aborted from None
            raise
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
        self._count(job, student, source)
        return answer

    def _check_open(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    def _count(self, job: JobT, student: str, source: str) -> None:
        self._metrics.tokens.labels(student, source).inc(job.num_tokens)
        self._metrics.sequences.labels(student, source).inc()

    def abort(self, error: StillhouseError) -> None:
        """End everything that is on its way; those who wait for it get `error`."""
        self._aborted = error
        for flight in list(self._flights.values()):
            flight.task.cancel()

    def _board(self, job: JobT, student: str) -> tuple[_Flight[AnswerT], str]:
        """The flight that a job goes by, and `coalesced` if it was there before, else `engine`."""
        key = job.key
        flight = self._flights.get(key)
        if flight is not None and not flight.task.cancelling():
            if student not in flight.students and flight.ticket.waiting:
                flight.students.add(student)
                self._queue.join(student, flight.ticket)
            return flight, "coalesced"
        ticket = Ticket(job.num_tokens)
        task = asyncio.create_task(self._score(job, student, ticket))
        flight = self._flights[key] = _Flight(ticket, task, {student})
        task.add_done_callback(lambda _: self._land(key, flight))
        self._queue.join(student, ticket)
        return flight, "engine"

    def _land(self, key: Hashable, flight: _Flight[AnswerT]) -> None:
        self._queue.leave(flight.ticket)
        # Read here, since those who waited may all have left; they raise it too, if they have not.
        if flight.task.cancelled() or flight.task.exception() is not None:
            self._forget(key, flight)
        elif self._store is not None:
            asyncio.get_running_loop().call_later(_SETTLING_S, self._forget, key, flight)
        else:
            self._keep(key, flight)

    def _keep(self, key: Hashable, flight: _Flight[AnswerT]) -> None:
        self._recent.append((key, flight))
        self._recent_bytes += flight.task.result().nbytes + _FLIGHT_BYTES
        while self._recent_bytes > RECENT_BYTES:
            old_key, old = self._recent.popleft()
            self._recent_bytes -= old.task.result().nbytes + _FLIGHT_BYTES
            self._forget(old_key, old)

    def _forget(self, key: Hashable, flight: _Flight[AnswerT]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _score(self, job: JobT, student: str, ticket: Ticket) -> AnswerT:
        queued = time.monotonic()
        async with self._queue.turn(ticket):
            started = time.monotonic()
            self._metrics.queue_seconds.labels(student).inc(started - queued)
            self._metrics.engine_sequences.labels(student).inc()
            try:
                answer = await self._engine_score(job)
            except asyncio.CancelledError:
                self._metrics.engine_aborted.labels(student).inc()
                raise
            except EngineDeadError as error:
                self._on_death(error)
                raise
            except EngineMemoryError:
                self._queue.halve(ticket)
                self._metrics.out_of_memory.inc()
                log.warning("engine out of memory", tokens=job.num_tokens, window=self._queue.window)
                raise
            finally:
                self._metrics.engine_seconds.labels(student).inc(time.monotonic() - started)
        self._check_answer(job, answer)
        if self._store is not None:
            self._store.put(job, answer)
        self._queue.recover()
        self.last_success = time.monotonic()
        self._rate.count(job.num_tokens, self._queue.busy_s())
        return answer
