"""The teacher service as one object: a `serving.service` of targets, with a store, an output head and a tokenizer.

Made by `run.py`; used by the routes of `app.py` and `compat`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from serving.engine import Job
from serving.http.keys import Keys
from serving.http.replies import Work
from serving.scheduling.admission import Permit
from serving.service import Service
from teacher_proto.client.expectation import canary_request
from teacher_proto.info import HIDDEN_WIDTH, TeacherInfo
from teacher_proto.model_files import ModelFolder, find_model
from teacher_proto.requests import Query, TargetSpec, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_service.engines.protocol import Engine
from teacher_service.engines.scripted_model import WIDTH as SCRIPTED_WIDTH
from teacher_service.head_file import KeptHead, ServedHead
from teacher_service.settings import TeacherSettings
from teacher_service.text import JsonPieces, Text, Turns

if TYPE_CHECKING:
    from teacher_service.stored import StoredTargets


class TeacherService(Service[Engine, TeacherSettings, Query, TokenTargets]):
    """A `Service` of targets."""

    def __init__(
        self, engine: Engine, settings: TeacherSettings, keys: Keys | None = None, store: StoredTargets | None = None
    ):
        super().__init__(engine, settings, keys, store)
        self._store = store
        self.hidden_width = HIDDEN_WIDTH
        self._folder: ModelFolder | None = None
        self._canary: TargetsRequest | None = None
        self._head = KeptHead(engine)
        self._reading_text = asyncio.Lock()
        self.tokenising = Turns()
        self._text: tuple[Text, JsonPieces] | None = None
        if store is not None:
            for name in ("entries", "bytes", "hits", "misses", "evicted", "damaged", "refused"):
                self.metrics.gauge(f"store_{name}", f"The target store's {name}", partial(_store_value, store, name))
            self.metrics.gauge("store_dropped", "Records not stored: the write queue was full", lambda: store.dropped)

    def readiness_job(self) -> Job[Query]:
        query = Query(np.zeros(1, dtype=np.int64), (0, 1), TargetSpec(kinds=("score",)))
        return Job(query, "readiness", urgent=True)

    def cost_of_longest(self) -> int:
        limits = self.engine.limits
        return limits.max_sequence_length * (limits.max_top_k + self.hidden_width + 1)

    async def _after_load(self) -> None:
        self._folder = await asyncio.to_thread(_model_folder, self.settings)
        self.hidden_width = _hidden_width(self._folder)
        self._canary = canary_request(self.info())
        if self._store is not None:
            await self._store.serve(self.info())

    async def close(self) -> None:
        await super().close()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    def info(self) -> TeacherInfo:
        """The body of `GET /v1/teacher`."""
        identity, engine = self.engine.identity, self.engine
        return TeacherInfo(
            identity=identity, fingerprint=identity.fingerprint, kinds=tuple(engine.kinds),
            limits=engine.limits.model_copy(update={"max_cost": self.admission.max_cost}),
            hidden_width=self.hidden_width,
        )  # fmt: skip

    async def head(self) -> ServedHead:
        """The file of the output head. NotFoundError if the engine serves no hidden states."""
        return await self._head.head()

    def work_of(
        self, asked: TargetsRequest, request_id: str, client: str, *, weight: int = 1, fresh: bool = False,
        urgent: bool = False,
    ) -> Work[Query]:  # fmt: skip
        """The work of a validated request. `weight`: the size of its response, relative to msgpack. `fresh`: as in
        `Job`. `urgent` work bypasses queue and admission."""
        jobs = [Job(query, f"{request_id}-{i}", urgent, fresh) for i, query in enumerate(asked.queries())]
        values = weight * (asked.values_per_token(self.hidden_width) + 1) - 1
        permit = Permit(client, 0, 0) if urgent else Permit.of(client, asked.num_tokens, values)
        return Work(request_id, client, permit, jobs)

    def is_canary(self, request: TargetsRequest) -> bool:
        """Whether this is the canary, or those of its sequences whose targets a client still lacks."""
        canary = self._canary
        if canary is None or request.rows is not None or request.spec != canary.spec:
            return False
        ours = {tokens_T.tobytes() for tokens_T in canary.sequences}
        theirs = [tokens_T.tobytes() for tokens_T in request.sequences]
        return len(theirs) <= len(ours) and ours.issuperset(theirs)

    async def text(self) -> tuple[Text, JsonPieces]:
        """The model's tokenizer, and the pieces of JSON made from its vocabulary. Loaded at first use."""
        async with self._reading_text:
            if self._text is None:
                self._text = await asyncio.to_thread(self._read_text)
        return self._text

    def _read_text(self) -> tuple[Text, JsonPieces]:
        path = self._folder.path if self._folder is not None else None
        text = Text(path, self.engine.limits.vocab_size)
        return text, JsonPieces(text)


def _store_value(store: StoredTargets, name: str) -> float:
    return float(getattr(store.stats(), name))


def _model_folder(settings: TeacherSettings) -> ModelFolder | None:
    """The folder that the engine has just loaded from; None for the scripted engine."""
    return None if settings.engine == "scripted" else find_model(settings.model, revision=settings.revision)


def _hidden_width(folder: ModelFolder | None) -> int:
    if folder is None:
        return SCRIPTED_WIDTH
    config = folder.config
    return int((config.get("text_config") or config).get("hidden_size", HIDDEN_WIDTH))
