"""Scores documents into a target dataset, one shard per unit. Used by `fill_command.py` and `ray_worker.py`.

A unit whose documents are all in the dataset is skipped; of one that is partly there, the rest is scored. Work in
progress when a process is killed is lost and done again; after a stop, or if the engine dies, what was scored until
then is written.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import structlog

from serving.engine import Job
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.errors import EngineDeadError, EngineError, InvalidTargetsError
from teacher_proto.process.stopping import finishing
from teacher_proto.requests import Query
from teacher_proto.store.entry import split
from teacher_proto.store.parquet import Pair
from teacher_service.engines.protocol import Engine
from teacher_service.offline.fill import FillReport, finish_one
from teacher_service.offline.fill_options import Slice
from teacher_service.offline.scoring import Scorer
from teacher_service.offline.units import Unit

log = structlog.get_logger("stillhouse.fill")
# Units whose documents have all been started but that are not written yet; if there are more, the engine waits.
_WRITING = 2


async def fill_dataset(
    engine: Engine, dataset: TargetDataset, units: Iterator[Unit], part: Slice | None = None, *, window: int = 16_384,
    report: FillReport | None = None, on_progress: Callable[[FillReport], object] = lambda report: None,
) -> FillReport:  # fmt: skip
    """Score the units of `part` with a started engine, `window` tokens at a time, and return when all is written.

    A document that the engine fails on is counted and skipped. EngineDeadError ends the run; `report`, if given, then
    holds what was done.
    """
    run, began = _Run(engine, dataset, report or FillReport(), on_progress), time.monotonic()
    try:
        await run.score_all(units, part or Slice(), window)
    finally:
        await run.write_the_rest()
        run.report.seconds = time.monotonic() - began
    return run.report


def missing_units(
    dataset: TargetDataset, units: Iterator[Unit], part: Slice, report: FillReport,
    on_progress: Callable[[FillReport], object],
) -> Iterator[Unit]:  # fmt: skip
    """The units of `part` that are not, or not entirely, in the dataset, each with only its missing documents."""
    for unit in units:
        if part.has(unit.number):
            there = dataset.holds(unit.documents)
            missing = tuple(tokens_T for tokens_T, has in zip(unit.documents, there, strict=True) if not has)
            report.skipped += len(unit.documents) - len(missing) + unit.repeats
            if missing:
                yield replace(unit, documents=missing, repeats=0)
                continue
        report.bytes_done += unit.num_bytes
        on_progress(report)


@dataclass(eq=False)
class _UnderWay:
    """A unit's documents to score, and the entries of those that are scored."""

    documents: list[np.ndarray]
    num_bytes: int
    entries: list[Sequence[Pair] | None]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @cached_property
    def tokens(self) -> int:
        return max(sum(map(len, self.documents)), 1)


class _Run:
    def __init__(
        self, engine: Engine, dataset: TargetDataset, report: FillReport, on_progress: Callable[[FillReport], object]
    ):
        self.report = report
        self._scorer, self._dataset, self._on_progress = Scorer(engine), dataset, on_progress
        self._spec, self._fingerprint = dataset.manifest.spec, dataset.manifest.teacher.fingerprint
        self._open: list[_UnderWay] = []
        self._stopping = False

    async def score_all(self, units: Iterator[Unit], part: Slice, window: int) -> None:
        running: dict[asyncio.Task[None], int] = {}
        writing: deque[asyncio.Task[None]] = deque()
        try:
            missing = missing_units(self._dataset, units, part, self.report, self._on_progress)
            while (found := await asyncio.to_thread(next, missing, None)) is not None:
                unit = _UnderWay(list(found.documents), found.num_bytes, [None] * len(found.documents))
                self._open.append(unit)
                for place, tokens_T in enumerate(unit.documents):
                    task = asyncio.create_task(self._score(unit, place))
                    unit.tasks.append(task)
                    running[task] = len(tokens_T)
                    while sum(running.values()) >= window:
                        await finish_one(running)
                writing.append(asyncio.create_task(self._write_when_done(unit)))
                while len(writing) > _WRITING:
                    await writing.popleft()
            while running:
                await finish_one(running)
            await asyncio.gather(*writing)
        finally:
            self._stopping = True
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *writing, return_exceptions=True)

    async def write_the_rest(self) -> None:
        """Write what was scored of unfinished units, however long that takes, even if cancelled meanwhile."""
        left, self._open = self._open, []
        cancelled = None
        with finishing():
            for unit in left:
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, unit))
                while not writing.done():
                    try:
                        await asyncio.shield(writing)
                    except asyncio.CancelledError as error:
                        cancelled = error
                writing.result()
        if cancelled is not None:
            raise cancelled

    async def _score(self, unit: _UnderWay, place: int) -> None:
        tokens_T = unit.documents[place]
        query = Query(tokens_T, (0, len(tokens_T)), self._spec)
        try:
            targets = await self._scorer.answer(Job(query, f"fill-{self.report.scored}"))
            unit.entries[place] = split(self._fingerprint, query, targets)
            self.report.scored += 1
            self.report.tokens += len(tokens_T)
        except EngineDeadError:
            raise
        except (EngineError, InvalidTargetsError) as error:
            self.report.failed += 1
            self.report.failures = [*self.report.failures, f"{len(tokens_T)} tokens: {error}"][:10]
            log.warning("document failed", tokens=len(tokens_T), error=str(error))
        self.report.bytes_done += unit.num_bytes * len(tokens_T) // unit.tokens
        self._on_progress(self.report)

    async def _write_when_done(self, unit: _UnderWay) -> None:
        await asyncio.wait(unit.tasks)
        if not self._stopping:
            self._open.remove(unit)
            await asyncio.to_thread(self._write, unit)

    def _write(self, unit: _UnderWay) -> None:
        done = [entries for entries in unit.entries if entries is not None]
        if done:
            self._dataset.add_shard(done)
