"""Scores documents with a started engine, and checks the targets. Used by `fill.py` and `dataset_fill.py`."""

from __future__ import annotations

import asyncio

from serving.engine import Job
from teacher_proto.errors import EngineMemoryError
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query
from teacher_proto.targets import TokenTargets, check_targets
from teacher_service.engines.protocol import Engine


def info_of(engine: Engine) -> TeacherInfo:
    """The identity, limits and kinds of a started engine."""
    return TeacherInfo(
        identity=engine.identity, fingerprint=engine.identity.fingerprint, limits=engine.limits, kinds=engine.kinds
    )


class Scorer:
    """Scores jobs, which may be concurrent, on one event loop."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._alone = asyncio.Lock()
        self._idle = asyncio.Event()
        self._computing = 0

    async def answer(self, job: Job[Query]) -> TokenTargets:
        """Checked targets; a job that did not fit the device together with others is retried alone."""
        targets = await self._beside_others(job)
        if targets is None:
            async with self._alone:
                await self._idle.wait()
                targets = await self._engine.score(job)
        check_targets(targets, job.query, self._engine.limits.vocab_size)
        return targets

    async def _beside_others(self, job: Job[Query]) -> TokenTargets | None:
        """Targets, or None if the device was too small for all at once. Nothing starts while a job is retried alone."""
        async with self._alone:
            self._computing += 1
            self._idle.clear()
        try:
            return await self._engine.score(job)
        except EngineMemoryError:
            return None
        finally:
            self._computing -= 1
            if not self._computing:
                self._idle.set()
