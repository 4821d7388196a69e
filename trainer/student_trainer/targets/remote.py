"""Targets from a teacher service with one or more replicas. Opened by `open`, called through the `Targets` protocol.

Only counted rows are requested; a document without any is not sent. The client splits requests to fit the service's
limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.settings import TeacherSettings
from student_trainer.targets.patience import retry_until
from student_trainer.targets.protocol import Admits, Queries, TeacherCard
from student_trainer.targets.queries import by_document, spec_of, valid_queries, with_documents
from teacher_proto.client.exchange import InfoT
from teacher_proto.client.replica_client import ReplicaClient
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.client.waiting import Waiting
from teacher_proto.errors import PoisonBatchError, StillhouseError, TeacherUnavailableError
from teacher_proto.requests import Limits, TargetsRequest
from teacher_proto.targets import TokenTargets

logger = logging.getLogger(__name__)


class RemoteTargets:
    """`make_client` is called on the event loop, where the client of `urls` runs. `patience` says how long `open` waits
    for a teacher to start, and how long `fetch` waits for one that is unreachable.
    """

    def __init__(self, make_client: Callable[[], TeacherClient], urls: Sequence[str], patience: TeacherSettings):
        self._make_client, self._urls, self._patience = make_client, urls, patience
        self.client: TeacherClient | None = None
        self._limits: Limits | None = None
        self._fingerprint = ""
        self._reason = ""

    async def open(self) -> TeacherCard:
        if self.client is None:
            self.client = self._make_client()
        try:
            whom = f"teacher at {', '.join(self._urls)}"
            info = await reach(self.client, whom, self._patience.start_within_s, self._patience.log_every_s)
        except TeacherUnavailableError as error:
            raise TeacherUnavailableError(
                f"no teacher at {', '.join(self._urls)}: {error}. Set its address with teacher.url=http://HOST:PORT, "
                "or wait for one that is starting with teacher.start_within_s=600"
            ) from error
        self._limits, self._fingerprint = info.limits, info.fingerprint
        return replace(TeacherCard.of(info, self.client.canary), admits=Admits.of(info))

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        """Results are kept when the rest must be requested again. TeacherUnavailableError after
        `teacher.outage_timeout_s` without a teacher."""
        assert self.client is not None and self._limits is not None, "open() comes before fetch()"
        client = self.client
        asked = valid_queries(batch, queries, self._limits.vocab_size)
        if not asked:
            return BatchTargets((None,) * len(queries), spec_of(queries), self._fingerprint)
        request = TargetsRequest.of(asked)
        given: dict[int, TokenTargets] = {}
        try:
            answered = await retry_until(
                lambda: client.targets(request, given=given), self._patience.outage_timeout_s, self._note, "teacher",
                lambda: len(given),
            )  # fmt: skip
        except PoisonBatchError as error:
            raise with_documents(error, batch) from error
        return BatchTargets(by_document(queries, answered), spec_of(queries), self._fingerprint)

    def _note(self, reason: str) -> None:
        self._reason = reason

    async def head(self) -> bytes:
        assert self.client is not None, "open() comes before head()"
        return await self.client.head()

    def outage(self) -> str:
        if self._reason:
            return self._reason
        lasted_s = self.client.outage_s if self.client is not None else 0.0
        return f"{self.client!r} has had no available replica for {lasted_s:.0f} s" if lasted_s else ""

    def waiting(self) -> Waiting | None:
        return self.client.waiting() if self.client is not None else None

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()


async def reach(client: ReplicaClient[Any, Any, InfoT], whom: str, within_s: float, log_every_s: float) -> InfoT:
    """Wait for a service and return what it publishes. While there is none, or its model is loading, log a line every
    `log_every_s`. TeacherUnavailableError after `within_s`.
    """
    clock = asyncio.get_running_loop().time
    deadline, patience_s = clock() + within_s, 0.0
    while True:
        try:
            return await client.teacher(patience_s)
        except StillhouseError as error:
            left_s = deadline - clock()
            if not error.retryable:
                raise
            if left_s <= 0:
                raise TeacherUnavailableError(error.message) from error
            logger.warning("no %s yet, waiting %.0f s more: %s", whom, left_s, error)
            patience_s = min(log_every_s, left_s)
