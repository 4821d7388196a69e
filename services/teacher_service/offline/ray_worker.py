"""One of the engines that fill a dataset together: an actor on a Ray cluster. Made by `ray_fill.py`; imports no Ray.

It scores the units that it is given and writes their shards. If it is killed, Ray restarts it on some node, and its
units are handed out again; what the dataset has by then is not scored twice.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.errors import EngineDeadError
from teacher_service.engines.protocol import Engine
from teacher_service.offline.dataset_fill import fill_dataset
from teacher_service.offline.fill import FillReport
from teacher_service.offline.scoring import info_of
from teacher_service.offline.units import Unit
from teacher_service.settings import parse_settings


@dataclass(frozen=True)
class Filled:
    """The outcome of a unit; `died` is why the engine died before the unit was done, if it did."""

    report: FillReport
    died: str = ""


class FillWorker:
    """`arguments` are those of `stillhouse-teacher`. The engine starts when first needed, and again after it died."""

    def __init__(self, arguments: list[str]):
        self._settings = parse_settings(arguments)
        self._engine: Engine | None = None
        self._datasets: dict[str, TargetDataset] = {}
        self._starting = asyncio.Lock()

    async def teacher(self) -> str:
        """The identity and limits of the engine, as the JSON of a `TeacherInfo`."""
        return info_of(await self._started()).model_dump_json()

    async def fill(self, url: str, manifest: Manifest, unit: Unit) -> Filled:
        """Score what the dataset lacks of a unit, and write a shard of it."""
        engine = await self._started()
        if url not in self._datasets:
            self._datasets[url] = await asyncio.to_thread(lambda: TargetDataset(url, create=manifest))
        report = FillReport()
        try:
            report = await fill_dataset(
                engine, self._datasets[url], iter([unit]), window=self._settings.window, report=report
            )
        except EngineDeadError as error:
            self._engine = None
            await engine.close()
            return Filled(report, str(error))
        return Filled(report)

    async def _started(self) -> Engine:
        from teacher_service.run import ENGINES

        async with self._starting:
            if self._engine is None:
                engine = ENGINES[self._settings.engine](self._settings)
                await engine.start()
                self._engine = engine
            return self._engine
