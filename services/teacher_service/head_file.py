"""The output head on disk, written by the engine when somebody first asks for it. Used by `service.py`."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from teacher_proto.errors import NotFoundError
from teacher_service.engine import Engine


class HeadFile:
    """One file in a temporary folder. Those who ask while it is written wait for it."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._writing = asyncio.Lock()
        self._folder: Path | None = None
        self._path: Path | None = None

    async def path(self) -> Path:
        if "hidden" not in self._engine.kinds:
            raise NotFoundError(
                "this teacher serves no hidden states, so no head: `kinds` at GET /v1/teacher says what it serves",
                field="path",
            )
        async with self._writing:
            if self._path is None:
                self._folder = self._folder or Path(tempfile.mkdtemp(prefix="stillhouse-head-"))
                path = self._folder / "head.safetensors"
                await self._engine.write_head(path)
                self._path = path
        return self._path

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = self._path = None
