"""Scores sequences into a target store without a server. Used by `fill_command.py`.

The engine, the reduction and the store are those that the service uses, so what is filled is what would be served.
Sequences that the store already has are skipped: a run that was stopped continues where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from serving.engine import Job
from teacher_proto.errors import EngineDeadError, EngineError, InvalidTargetsError
from teacher_proto.info import TeacherInfo
from teacher_proto.process.stopping import finishing
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.store.entry import sequence_key
from teacher_proto.store.target_store import TargetStore
from teacher_proto.store.writer import StoreWriter
from teacher_proto.targets import TokenTargets
from teacher_service.engines.protocol import Engine
from teacher_service.offline.documents import Piece
from teacher_service.offline.scoring import Scorer, info_of

log = structlog.get_logger("stillhouse.fill")

_SETTLING = 4096


@dataclass
class FillReport:
    """What a run did, in sequences; `tokens` counts the tokens scored. `failures` holds the first reasons.

    `lost` entries did not stay: the store was full and evicted older ones, or refused them. `bytes_done` is the size of
    the data that was scored, skipped or failed.
    """

    scored: int = 0
    skipped: int = 0
    failed: int = 0
    lost: int = 0
    tokens: int = 0
    bytes_done: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


async def fill(
    engine: Engine,
    store: TargetStore,
    pieces: Iterator[Piece],
    spec: TargetSpec,
    *,
    window: int = 16_384,
    on_progress: Callable[[FillReport], object] = lambda report: None,
) -> FillReport:
    """Score `pieces` with a started engine, `window` tokens at a time, and return when everything is on disk.

    A sequence that the engine fails on is counted and skipped. EngineDeadError ends the run; what was scored until then
    is kept.
    """
    info = info_of(engine)
    store.remember(info)
    run, before = _Run(engine, store, spec, info, on_progress), store.stats()
    began = time.monotonic()
    try:
        await run.score_all(pieces, window)
    finally:
        await _close(run.writer)
        after = store.stats()
        run.report.lost = after.evicted + after.refused - before.evicted - before.refused
        run.report.seconds = time.monotonic() - began
    return run.report


class _Run:
    def __init__(
        self, engine: Engine, store: TargetStore, spec: TargetSpec, info: TeacherInfo,
        on_progress: Callable[[FillReport], object],
    ):  # fmt: skip
        self.report = FillReport()
        self.writer = StoreWriter(store)
        self._scorer = Scorer(engine)
        self._store = store
        self._spec = spec
        self._info = info
        self._on_progress = on_progress
        self._on_way: set[bytes] = set()
        self._settling: list[bytes] = []
        self._bytes_read = 0

    async def score_all(self, pieces: Iterator[Piece], window: int) -> None:
        running: dict[asyncio.Task[None], int] = {}
        try:
            while (missing := await asyncio.to_thread(self._next_missing, pieces)) is not None:
                job, num_bytes = missing
                running[asyncio.create_task(self._score(job, num_bytes))] = job.query.num_tokens
                while sum(running.values()) >= window:
                    await finish_one(running)
            while running:
                await finish_one(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _next_missing(self, pieces: Iterator[Piece]) -> tuple[Job[Query], int] | None:
        """The next sequence that is neither in the store nor being scored, and the bytes of data that it accounts
        for.
        """
        if len(self._settling) > _SETTLING:
            # What was given to the writer before this flush can be found in the store from now on.
            settled, self._settling = self._settling, []
            self.writer.flush()
            self._on_way.difference_update(settled)
        for piece in pieces:
            num_bytes, self._bytes_read = piece.bytes_read - self._bytes_read, piece.bytes_read
            number = self.report.scored + self.report.skipped
            query = Query(piece.tokens_T, (0, len(piece.tokens_T)), self._spec)
            key = sequence_key(self._info.fingerprint, piece.tokens_T)
            if key not in self._on_way and not self._store.has(self._info.fingerprint, query):
                self._on_way.add(key)
                return Job(query, f"fill-{number}"), num_bytes
            self.report.skipped += 1
            self.report.bytes_done += num_bytes
            self._on_progress(self.report)
        return None

    async def _score(self, job: Job[Query], num_bytes: int) -> None:
        try:
            targets = await self._scorer.answer(job)
            await self._keep(job.query, targets)
            self.report.scored += 1
            self.report.tokens += job.query.num_tokens
        except EngineDeadError:
            raise
        except (EngineError, InvalidTargetsError) as error:
            self.report.failed += 1
            self.report.failures = [*self.report.failures, f"{job.query.num_tokens} tokens: {error}"][:10]
            log.warning("sequence failed", tokens=job.query.num_tokens, error=str(error))
        finally:
            self._settling.append(sequence_key(self._info.fingerprint, job.query.tokens_T))
            self.report.bytes_done += num_bytes
            self._on_progress(self.report)

    async def _keep(self, query: Query, targets: TokenTargets) -> None:
        """Give targets to the writer, and wait for the disk if that is slower than the engine."""
        fingerprint = self._info.fingerprint
        if not self.writer.add(fingerprint, query, targets):
            await asyncio.to_thread(self.writer.flush)
            if not self.writer.add(fingerprint, query, targets):
                await asyncio.to_thread(self._store.put, fingerprint, query, targets)


async def _close(writer: StoreWriter) -> None:
    """Write what was scored to disk, however long that takes, even if cancelled meanwhile."""
    closing = asyncio.ensure_future(asyncio.to_thread(writer.close))
    cancelled = None
    with finishing():
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError as error:
                cancelled = error
    closing.result()
    if cancelled is not None:
        raise cancelled


async def finish_one(running: dict[asyncio.Task[None], int]) -> None:
    """Wait until one of `running` has finished, and remove it; raises its error."""
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del running[task]
        task.result()
