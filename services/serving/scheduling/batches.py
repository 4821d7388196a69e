"""Batching for engines that compute in this process: jobs of similar length, one batch at a time, in a thread.

Used by the engines over transformers. A job that is cancelled while it waits is never computed; an urgent one goes into
the next batch. If a batch fails, its jobs are retried one by one, so that a bad job fails alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.engine import Job, QueryT, RecordT
from teacher_proto.errors import EngineDeadError, EngineError, EngineMemoryError

# The shortest sequence of a batch, as a fraction of its longest: limits padding.
_LEAST_LENGTH = 0.75
T = TypeVar("T")


@dataclass(eq=False)
class _Waiting(Generic[QueryT, RecordT]):
    job: Job[QueryT]
    answer: asyncio.Future[RecordT]


class Batches(Generic[QueryT, RecordT]):
    """`compute` returns the results of a batch, in order. `max_tokens` bounds a batch, padding included; a longer job
    is a batch by itself. `tokens_computed` counts the tokens of all jobs passed to `compute`, retries included. Every
    method but `compute` runs in the event loop's thread."""

    def __init__(self, name: str, compute: Callable[[Sequence[QueryT]], Sequence[RecordT]], max_tokens: int):
        self._name = name
        self._compute_batch = compute
        self._max_tokens = max_tokens
        self.tokens_computed = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name.replace(" ", "-"))
        self._waiting: list[_Waiting[QueryT, RecordT]] = []
        self._open: set[_Waiting[QueryT, RecordT]] = set()
        self._pump: asyncio.Task[None] | None = None
        self._death: str | None = "it has not been started"

    async def start(self, load: Callable[[], T]) -> T:
        """Run `load` in the thread; jobs are accepted once it has returned."""
        loaded = await asyncio.get_running_loop().run_in_executor(self._thread, load)
        self._death = None
        return loaded

    async def answer(self, job: Job[QueryT]) -> RecordT:
        """The result of a job. EngineError if it failed, EngineMemoryError if it ran out of memory."""
        self.check()
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
            self._pump.add_done_callback(self._on_pump_end)
        self._open.add(waiting)
        try:
            return await waiting.answer
        finally:
            self._open.discard(waiting)

    def check(self) -> None:
        """EngineDeadError if jobs are no longer computed."""
        if self._death is not None:
            raise EngineDeadError(f"the {self._name} is dead: {self._death}")

    async def close(self) -> None:
        """Wait for the running batch, and fail the jobs that wait."""
        self._die("it was closed")
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        while batch := self._next_batch():
            await self._compute(batch)

    def _next_batch(self) -> list[_Waiting[QueryT, RecordT]]:
        """The job that has waited longest, urgent ones first, and others of similar length, up to `max_tokens`."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.answer.done()]
        self._waiting.sort(key=lambda waiting: not waiting.job.urgent)
        batch: list[_Waiting[QueryT, RecordT]] = []
        left: list[_Waiting[QueryT, RecordT]] = []
        for waiting in self._waiting:
            lengths = [other.job.query.num_tokens for other in (*batch, waiting)]
            alike = min(lengths) >= _LEAST_LENGTH * max(lengths)
            fits = max(lengths) * len(lengths) <= self._max_tokens
            (batch if not batch or (alike and fits) else left).append(waiting)
        self._waiting = left
        return batch

    async def _compute(self, batch: list[_Waiting[QueryT, RecordT]]) -> None:
        queries = [waiting.job.query for waiting in batch]
        self.tokens_computed += sum(query.num_tokens for query in queries)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute_batch, queries)
        except (EngineError, RuntimeError, IndexError, ValueError, MemoryError) as error:
            if len(batch) > 1:
                for waiting in batch:
                    await self._compute([waiting])
                return
            if not batch[0].answer.done():
                batch[0].answer.set_exception(_failure(error, batch[0].job.request_id))
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    def _on_pump_end(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and (error := pump.exception()) is not None:
            self._die(repr(error))

    def _die(self, reason: str) -> None:
        """Fail all waiting jobs, and all later ones, with EngineDeadError."""
        self._death = self._death or reason
        for waiting in self._open:
            if not waiting.answer.done():
                waiting.answer.set_exception(EngineDeadError(f"the {self._name} is dead: {self._death}"))


def _failure(error: Exception, request_id: str) -> EngineError:
    """An engine's own error unchanged, any other as EngineError, or EngineMemoryError if its type or text says so."""
    if isinstance(error, EngineError):
        error.request_id = error.request_id or request_id
        return error
    import torch

    text = str(error) or type(error).__name__
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    kind = EngineMemoryError if is_memory else EngineError
    return kind(f"the forward pass failed: {text}", request_id=request_id)
