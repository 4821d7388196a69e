"""The target store as the coalescer sees it: read without blocking the event loop, written in the background.

Made by `run.py` if `--store` is given; `coalescer.py` looks into it first, and gives it what the engine computed.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query
from teacher_proto.store.target_store import StoreStats, TargetStore
from teacher_proto.store.writer import StoreWriter
from teacher_proto.targets import TokenTargets

_READERS = 4


class StoredTargets:
    """One open store and the fingerprint that it is read and written under. ValueError if it can't be opened."""

    def __init__(self, path: Path, max_bytes: int):
        self._store = TargetStore(path, max_bytes)
        self._writer = StoreWriter(self._store)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._fingerprint = ""

    async def serve(self, info: TeacherInfo) -> None:
        """Set the teacher's identity, once it is known."""
        self._fingerprint = info.fingerprint
        await asyncio.get_running_loop().run_in_executor(self._readers, self._store.remember, info)

    async def get(self, query: Query) -> TokenTargets | None:
        assert self._fingerprint, "the teacher must be known before the store is read"
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, self._store.get, self._fingerprint, query
        )

    def put(self, query: Query, targets: TokenTargets) -> bool:
        """Queue targets to be written; False if too much is queued already: then they are dropped and counted."""
        return self._writer.add(self._fingerprint, query, targets)

    @property
    def dropped(self) -> int:
        return self._writer.dropped

    def stats(self) -> StoreStats:
        return self._store.stats()

    def close(self) -> None:
        """Write what is queued. Blocks for the duration of a transaction."""
        self._writer.close()
        self._readers.shutdown()
        self._store.close()
