"""`SyncTeacherClient`: the same client for scripts and notebooks, without an event loop of one's own.

with SyncTeacherClient("http://localhost:8000") as client:
    targets = client.targets(TargetsRequest(sequences=[[1, 2, 3]], top_k=64))
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from teacher_proto.client import TeacherClient
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets

T = TypeVar("T")


class SyncTeacherClient:
    """`TeacherClient` on a thread of its own; takes the same arguments. Works inside a running event loop too."""

    def __init__(self, urls: str | Sequence[str], **arguments: Any):
        self.client = TeacherClient(urls, **arguments)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()

    def teacher(self, wait_s: float = 0.0) -> TeacherInfo:
        return self._run(self.client.teacher(wait_s))

    def targets(self, request: TargetsRequest, *, deadline_s: float | None = None) -> list[TokenTargets]:
        return self._run(self.client.targets(request, deadline_s=deadline_s))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> SyncTeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C leaves the request running otherwise.
            future.cancel()
            raise
