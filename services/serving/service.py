"""A service as one object: engine, admission, queue, metrics. Each service subclasses it with what it serves.

`process.py` runs it; `routes.py` adds the routes that every service has.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

from serving.engine import AnyEngine, Job, QueryT, RecordT
from serving.http.keys import Keys
from serving.metrics import Metrics
from serving.readiness import Readiness
from serving.scheduling.admission import Admission, ControlLane
from serving.scheduling.coalescer import Coalescer, RecordStore
from serving.scheduling.fair import FairQueue, Rate
from serving.settings import ServiceSettings
from serving.status import STEP_S, History, StatusBody, totals
from teacher_proto.errors import EngineDeadError, LoadingError, OverloadedError, StillhouseError

State = Literal["loading", "ready", "draining", "dead"]
EngineT = TypeVar("EngineT", bound=AnyEngine)
SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


class Service(ABC, Generic[EngineT, SettingsT, QueryT, RecordT]):
    """What `serving.process` runs: an engine and everything around it. `on_death` is called when a job finds the engine
    dead.

    A subclass provides the job that shows that the engine works (`readiness_job`). `unit` is what the cost of a
    response counts, in words.
    """

    unit = "tokens x (K + 1)"

    def __init__(
        self, engine: EngineT, settings: SettingsT, keys: Keys | None = None,
        store: RecordStore[QueryT, RecordT] | None = None,
    ):  # fmt: skip
        self.engine = engine
        self.settings = settings
        self.keys = keys or Keys()
        self.metrics = Metrics()
        self.queue = FairQueue(settings.window)
        self.rate = Rate(at_most=self.queue.rate_at_most)
        self.admission = Admission(settings.capacity, shared=self.keys.required, rate=self.rate, unit=self.unit)
        self.control = ControlLane()
        self.coalescer: Coalescer[QueryT, RecordT] = Coalescer(
            engine.score, self.queue, self.rate, self.metrics, self._died, store,
            keep_s=settings.keep_time, keep_bytes=settings.keep_bytes,
        )  # fmt: skip
        self.readiness = Readiness(self._run_a_token, self.coalescer, self.queue, self.rate, settings.ready_time)
        self.on_death: Callable[[EngineDeadError], None] = lambda error: None
        self.started = False
        self._death: EngineDeadError | None = None
        self._history = History(self.metrics)
        self._keeping: list[asyncio.Task[None]] = []
        self._add_gauges()

    @abstractmethod
    def readiness_job(self) -> Job[QueryT]:
        """A job of one token."""

    @abstractmethod
    def cost_of_longest(self) -> int:
        """The highest cost of one sequence of maximum length; an empty service admits it whatever its capacity."""

    async def start(self) -> None:
        await self.engine.start()
        await self._after_load()
        self.admission.max_cost = max(self.admission.capacity, self.cost_of_longest())
        self.started = True
        self._keeping = [
            asyncio.create_task(self._history.keep(lambda: self.queue.waiting_tokens)),
            asyncio.create_task(self.readiness.watch()),
        ]

    async def _after_load(self) -> None:
        """Hook for what a service does between its engine's start and its first request."""

    async def check(self) -> None:
        await self.engine.check()

    def drain(self, reason: str) -> None:
        self.admission.close(reason)
        self.coalescer.drain()

    async def drained(self) -> None:
        await self.admission.empty.wait()

    def abort(self, error: StillhouseError) -> None:
        self.coalescer.abort(error)

    async def close(self) -> None:
        for task in self._keeping:
            task.cancel()
        await self.engine.close()

    @property
    def state(self) -> State:
        if self._death is not None:
            return "dead"
        if not self.started:
            return "loading"
        return "draining" if self.admission.closed else "ready"

    def status(self) -> StatusBody:
        """The body of `/v1/status`: numbers for people, over the last five minutes."""
        identity, history = self.engine.identity, self._history
        return StatusBody(
            model=identity.semantic.model, dtype=identity.semantic.dtype, quantization=identity.semantic.quantization,
            engine=f"{identity.numeric.engine} {identity.numeric.engine_version}", device=identity.numeric.device,
            fingerprint=identity.fingerprint, state=self.state, keys=self.keys.required,
            uptime_s=round(history.uptime_s, 1), step_s=STEP_S,
            tokens_per_second=round(sum(history.recent().values()), 1), history=history.curves(),
            queue_tokens=self.queue.waiting_tokens, engine_tokens=self.queue.running, window=self.queue.window,
            requests_inside=self.admission.permits, used=round(self.admission.cost / self.admission.capacity, 4),
            sources=totals(self.metrics.tokens, "source"), rejected=totals(self.metrics.rejected, "reason"),
            clients=history.clients(self.admission.clients()),
        )  # fmt: skip

    def require_started(self) -> None:
        """LoadingError while the model loads, EngineDeadError once the engine is dead."""
        if self._death is not None:
            raise self._death
        if not self.started:
            raise LoadingError("the service is still loading its model", retry_after=1.0)

    async def check_ready(self) -> None:
        """Return if requests are admitted and the engine makes progress; otherwise raise what a probe should see."""
        self.require_started()
        if self.admission.closed:
            raise OverloadedError("the service is draining", retry_after=5.0)
        await self.engine.check()
        await self.readiness.check()

    async def _run_a_token(self) -> None:
        await self.engine.score(self.readiness_job())

    def _died(self, error: EngineDeadError) -> None:
        self._death = error
        self.on_death(error)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("admitted_requests", "Requests admitted and not yet finished", lambda: self.admission.permits)
        gauge("admitted_tokens", "Tokens of admitted requests", lambda: self.admission.tokens)
        gauge("admitted_cost", f"Cost of admitted requests: {self.unit}", lambda: self.admission.cost)
        gauge("waiting_requests", "Requests waiting for admission", lambda: self.admission.waiting)
        gauge("capacity", f"Cost that can be admitted: {self.unit}", lambda: self.admission.capacity)
        gauge("queue_tokens", "Tokens waiting for the engine", lambda: self.queue.waiting_tokens)
        gauge("engine_tokens", "Tokens in the engine", lambda: self.queue.running)
        gauge("engine_window_tokens", "Tokens that may be in the engine at a time", lambda: self.queue.window)
        gauge("engine_tokens_computed", "Tokens that the engine has computed", lambda: self.engine.tokens_computed)
        gauge(
            "unread_bytes", "Bytes of records kept for clients that disconnected", lambda: self.coalescer.unread_bytes
        )
        gauge("in_flight_sequences", "Distinct sequences being computed", lambda: self.coalescer.in_flight)
        gauge("tokens_per_second", "Recent throughput of the engine", lambda: self.rate.tokens_per_second)
        gauge("ready", "1 while requests are admitted", lambda: float(self.started and not self.admission.closed))
