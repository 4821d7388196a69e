"""A service as one object: engine, door, queue, metrics. Each service's own adds what it answers.

`run.py` runs it, `routes.py` puts the routes on it that every service has.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

from serving.admission import Admission, RetryAfter
from serving.answers import Answers, AnswerStore
from serving.engine import AnswerT, AnyEngine, JobT
from serving.fair import FairQueue
from serving.keys import Keys
from serving.metrics import Metrics
from serving.settings import ServiceSettings
from serving.status import STEP_S, History, StatusBody, totals
from teacher_proto.errors import EngineDeadError, OverloadedError, StillhouseError

State = Literal["loading", "ready", "draining", "dead"]
EngineT = TypeVar("EngineT", bound=AnyEngine)
SettingsT = TypeVar("SettingsT", bound=ServiceSettings)
_PROBE_TIMEOUT_S = 10.0
_FRESH_S = 1.0


class Service(ABC, Generic[EngineT, SettingsT, JobT, AnswerT]):
    """`serving.process.Backend` around an engine. `on_death` is told of a dead engine by whoever meets it first.

    A subclass says what is asked of the engine to prove itself (`readiness_job`), and which answers only a broken
    model gives (`check_sound`). `unit` is what the cost of its answers counts.
    """

    unit = "tokens x (K + 1)"

    def __init__(
        self, engine: EngineT, settings: SettingsT, keys: Keys | None = None,
        store: AnswerStore[JobT, AnswerT] | None = None,
    ):  # fmt: skip
        self.engine = engine
        self.settings = settings
        self.keys = keys or Keys()
        self.metrics = Metrics()
        self.rate = RetryAfter()
        self.admission = Admission(settings.capacity, shared=self.keys.required, retry_after=self.rate, unit=self.unit)
        self.queue = FairQueue(settings.window)
        self.answers: Answers[JobT, AnswerT] = Answers(
            engine.score, self.check_sound, self.queue, self.rate, self.metrics, self._died, store
        )
        self.on_death: Callable[[EngineDeadError], None] = lambda error: None
        self.started = False
        self._death: EngineDeadError | None = None
        self._probe: asyncio.Task[None] | None = None
        self._history = History(self.metrics)
        self._keeping: asyncio.Task[None] | None = None
        self._add_gauges()

    @abstractmethod
    def readiness_job(self) -> JobT:
        """A job of one token."""

    @abstractmethod
    def check_sound(self, job: JobT, answer: AnswerT) -> None:
        """EngineError for an answer that only a broken model computes."""

    async def start(self) -> None:
        await self.engine.start()
        await self._after_load()
        self.started = True
        self._keeping = asyncio.create_task(self._history.keep(lambda: self.queue.waiting_tokens))

    async def _after_load(self) -> None:
        """What a service still does between its engine's start and its own first request."""

    async def check(self) -> None:
        await self.engine.check()

    def drain(self, reason: str) -> None:
        self.admission.close(reason)

    async def drained(self) -> None:
        await self.admission.empty.wait()

    def abort(self, error: StillhouseError) -> None:
        self.answers.abort(error)

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        await self.engine.close()

    @property
    def state(self) -> State:
        if self._death is not None:
            return "dead"
        if not self.started:
            return "loading"
        return "draining" if self.admission.closed else "ready"

    def status(self) -> StatusBody:
        """What `/v1/status` answers: numbers for people, over the last five minutes."""
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
            students=history.students(self.admission.students()),
        )  # fmt: skip

    def require_started(self) -> None:
        """OverloadedError while the model loads, EngineDeadError when it is gone."""
        if self._death is not None:
            raise self._death
        if not self.started:
            raise OverloadedError("the service is still loading its model", retry_after=1.0)

    async def check_ready(self) -> None:
        """Return if a token gets through the engine; the error that a probe should see otherwise.

        A token is run only where no answer came of late: a busy engine proves itself.
        """
        self.require_started()
        if self.admission.closed:
            raise OverloadedError("the service is draining", retry_after=5.0)
        await self.engine.check()
        if time.monotonic() - self.answers.last_success < _FRESH_S:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_a_token())
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), _PROBE_TIMEOUT_S)
        except TimeoutError:
            raise OverloadedError(f"no token got through the engine in {_PROBE_TIMEOUT_S:g} s") from None

    async def _run_a_token(self) -> None:
        await self.engine.score(self.readiness_job())
        self.answers.last_success = time.monotonic()

    def _died(self, error: EngineDeadError) -> None:
        self._death = error
        self.on_death(error)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("admitted_requests", "Requests in the house", lambda: self.admission.permits)
        gauge("admitted_tokens", "Tokens in the house", lambda: self.admission.tokens)
        gauge("admitted_cost", f"Cost in the house: {self.unit}", lambda: self.admission.cost)
        gauge("capacity", f"Cost that fits: {self.unit}", lambda: self.admission.capacity)
        gauge("queue_tokens", "Tokens that wait for a turn", lambda: self.queue.waiting_tokens)
        gauge("engine_tokens", "Tokens in the engine", lambda: self.queue.running)
        gauge("engine_window_tokens", "Tokens that the engine may be handed", lambda: self.queue.window)
        gauge("in_flight_sequences", "Different sequences on their way", lambda: self.answers.in_flight)
        gauge("tokens_per_second", "Rate of the engine, measured of late", lambda: self.rate.tokens_per_second)
        gauge("ready", "1 when requests are let in", lambda: float(self.started and not self.admission.closed))
