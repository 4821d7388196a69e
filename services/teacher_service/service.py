"""The teacher service as one object: engine, door, queue, metrics. `main.py` runs it, `app.py` puts routes on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from serving.admission import Admission, Permit, RetryAfter
from serving.fair import FairQueue
from serving.keys import Keys
from serving.metrics import Metrics
from teacher_proto.errors import EngineDeadError, OverloadedError, StillhouseError
from teacher_proto.info import TeacherInfo
from teacher_proto.model_files import ModelFolder, find_model
from teacher_proto.requests import TargetSpec
from teacher_service.answers import Answers
from teacher_service.asked import Asked
from teacher_service.engine import Engine, Job
from teacher_service.head_file import HeadFile
from teacher_service.settings import TeacherSettings
from teacher_service.status import STEP_S, History, StatusBody, totals
from teacher_service.text import JsonPieces, Text

if TYPE_CHECKING:
    from teacher_service.stored import StoredAnswers

State = Literal["loading", "ready", "draining", "dead"]
_PROBE_TIMEOUT_S = 10.0
_FRESH_S = 1.0
# What a hidden state is taken to hold for admission where no config says: 7B models have 4096.
_HIDDEN_WIDTH = 4096


class TeacherService:
    """`serving.process.Backend` around an engine. `on_death` is told of a dead engine by whoever meets it first."""

    def __init__(
        self, engine: Engine, settings: TeacherSettings, keys: Keys | None = None, store: StoredAnswers | None = None
    ):
        self.engine = engine
        self.settings = settings
        self.keys = keys or Keys()
        self.metrics = Metrics()
        self.rate = RetryAfter()
        self.admission = Admission(settings.capacity, shared=self.keys.required, retry_after=self.rate)
        self.queue = FairQueue(settings.window)
        self.answers = Answers(engine, self.queue, self.rate, self.metrics, self._died, store)
        self._store = store
        self.on_death: Callable[[EngineDeadError], None] = lambda error: None
        self.started = False
        self.hidden_width = _HIDDEN_WIDTH
        self._folder: ModelFolder | None = None
        self._death: EngineDeadError | None = None
        self._probe: asyncio.Task[None] | None = None
        self._history = History(self.metrics)
        self._keeping: asyncio.Task[None] | None = None
        self._head = HeadFile(engine)
        self._reading_text = asyncio.Lock()
        self._text: tuple[Text, JsonPieces] | None = None
        self._add_gauges()

    async def start(self) -> None:
        await self.engine.start()
        self._folder = await asyncio.to_thread(_model_folder, self.settings)
        self.hidden_width = _hidden_width(self._folder)
        if self._store is not None:
            await self._store.serve(self.info())
        self.started = True
        self._keeping = asyncio.create_task(self._history.keep(lambda: self.queue.waiting_tokens))

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
        self._head.remove()
        await self.engine.close()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    @property
    def state(self) -> State:
        if self._death is not None:
            return "dead"
        if not self.started:
            return "loading"
        return "draining" if self.admission.closed else "ready"

    def info(self) -> TeacherInfo:
        """What `GET /v1/teacher` answers."""
        identity, engine = self.engine.identity, self.engine
        return TeacherInfo(
            identity=identity, fingerprint=identity.fingerprint, limits=engine.limits, kinds=tuple(engine.kinds)
        )

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

    async def head(self) -> Path:
        """The file of the output head. NotFoundError where the engine can't give hidden states."""
        return await self._head.path()

    def admit(self, asked: Asked) -> AbstractContextManager[Permit]:
        """A permit for the time of the `with` block; OverloadedError or QuotaError at the door."""
        values = asked.values_per_token(self.hidden_width)
        return self.admission.admit(asked.student, asked.request.num_tokens, values)

    async def text(self) -> tuple[Text, JsonPieces]:
        """The model's tokenizer and the pieces of JSON made of its vocabulary, read when first asked for."""
        async with self._reading_text:
            if self._text is None:
                self._text = await asyncio.to_thread(self._read_text)
        return self._text

    def _read_text(self) -> tuple[Text, JsonPieces]:
        path = self._folder.path if self._folder is not None else None
        text = Text(path, self.engine.limits.vocab_size)
        return text, JsonPieces(text)

    def require_started(self) -> None:
        """OverloadedError while the model loads, EngineDeadError when it is gone."""
        if self._death is not None:
            raise self._death
        if not self.started:
            raise OverloadedError("the teacher is still loading its model", retry_after=2.0)

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
        job = Job(np.zeros(1, dtype=np.int64), (0, 1), TargetSpec(kinds=("score",)), "readiness")
        await self.engine.score(job)
        self.answers.last_success = time.monotonic()

    def _died(self, error: EngineDeadError) -> None:
        self._death = error
        self.on_death(error)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("admitted_requests", "Requests in the house", lambda: self.admission.permits)
        gauge("admitted_tokens", "Tokens in the house", lambda: self.admission.tokens)
        gauge("admitted_cost", "Tokens x (K + 1) in the house", lambda: self.admission.cost)
        gauge("capacity", "Tokens x (K + 1) that fit", lambda: self.admission.capacity)
        gauge("queue_tokens", "Tokens that wait for a turn", lambda: self.queue.waiting_tokens)
        gauge("engine_tokens", "Tokens in the engine", lambda: self.queue.running)
        gauge("engine_window_tokens", "Tokens that the engine may be handed", lambda: self.queue.window)
        gauge("in_flight_sequences", "Different sequences on their way", lambda: self.answers.in_flight)
        gauge("tokens_per_second", "Rate of the engine, measured of late", lambda: self.rate.tokens_per_second)
        if (store := self._store) is not None:
            for name in ("entries", "bytes", "hits", "misses", "evicted", "damaged", "refused"):
                gauge(f"store_{name}", f"The target store's {name}", partial(_store_value, store, name))
            gauge("store_dropped", "Answers not written since too many waited", lambda: store.dropped)
        gauge("ready", "1 when requests are let in", lambda: float(self.started and not self.admission.closed))


def _store_value(store: StoredAnswers, name: str) -> float:
    return float(getattr(store.stats(), name))


def _model_folder(settings: TeacherSettings) -> ModelFolder | None:
    """The folder that the engine has just loaded from; the scripted engine has none."""
    return None if settings.engine == "scripted" else find_model(settings.model, revision=settings.revision)


def _hidden_width(folder: ModelFolder | None) -> int:
    config = folder.config if folder is not None else {}
    return int((config.get("text_config") or config).get("hidden_size", _HIDDEN_WIDTH))
