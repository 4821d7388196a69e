"""`SyncTeacherClient` and `SyncAttentionClient`: blocking versions of the clients, for scripts without an event loop.

with SyncTeacherClient("http://localhost:8000") as client:
    targets = client.targets(TargetsRequest(sequences=[[1, 2, 3]], top_k=64))
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from teacher_proto.attention import AttentionInfo, AttentionRequest
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.client.attention_client import AttentionClient
from teacher_proto.client.replica_client import OnProgress
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.client.waiting import Waiting
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets

T = TypeVar("T")
ClientT = TypeVar("ClientT", bound=TeacherClient | AttentionClient)


class _SyncClient(Generic[ClientT]):
    """Runs a client on a separate thread, which also calls `on_progress`. Works inside a running event loop too."""

    def __init__(self, client: ClientT):
        self.client: ClientT = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def waiting(self) -> Waiting | None:
        """The progress of all requests in flight, including those of other threads; None if there are none."""
        return self.client.waiting()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Otherwise the request would go on after Ctrl-C.
            future.cancel()
            raise


class SyncTeacherClient(_SyncClient[TeacherClient]):
    """`TeacherClient` for scripts; takes the same arguments."""

    def __init__(self, urls: str | Sequence[str], **arguments: Any):
        super().__init__(TeacherClient(urls, **arguments))

    def teacher(self, wait_s: float = 0.0) -> TeacherInfo:
        return self._run(self.client.teacher(wait_s))

    def targets(
        self, request: TargetsRequest, *, deadline_s: float | None = None,
        given: dict[int, TokenTargets] | None = None, on_progress: OnProgress | None = None,
    ) -> list[TokenTargets]:  # fmt: skip
        return self._run(self.client.targets(request, deadline_s=deadline_s, given=given, on_progress=on_progress))

    def head(self) -> bytes:
        return self._run(self.client.head())


class SyncAttentionClient(_SyncClient[AttentionClient]):
    """`AttentionClient` for scripts; takes the same arguments."""

    def __init__(self, urls: str | Sequence[str], **arguments: Any):
        super().__init__(AttentionClient(urls, **arguments))

    def teacher(self, wait_s: float = 0.0) -> AttentionInfo:
        return self._run(self.client.teacher(wait_s))

    def attention(
        self, request: AttentionRequest, *, deadline_s: float | None = None,
        given: dict[int, AttentionTargets] | None = None, on_progress: OnProgress | None = None,
    ) -> list[AttentionTargets]:  # fmt: skip
        return self._run(self.client.attention(request, deadline_s=deadline_s, given=given, on_progress=on_progress))
