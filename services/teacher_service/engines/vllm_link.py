"""The service's end of its vLLM process: starts it, sends jobs, receives results, ends it. Used by `VllmEngine`.

All methods run in the event loop; one thread reads the pipe and another writes to it, so that the loop never blocks.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from serving.logs import done
from teacher_service.engines import vllm_process
from teacher_service.engines.vllm_messages import receive, send

_END_WITHIN_S = 3.0
GONE = "a vLLM engine process has ended; its output on stderr says why"


class EngineGone(Exception):
    """The process has ended. The error's message is a sentence."""


class JobFailed(Exception):
    """vLLM failed on one job, and continues."""


class EngineProcess:
    """The process and its jobs. `start` comes first; `close` may be called at any time, and twice."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None
        self._writer = ThreadPoolExecutor(1, "vllm-writer")
        self._facts: asyncio.Future[dict[str, Any]] | None = None
        self._answers: dict[int, asyncio.Future[tuple[np.ndarray, int]]] = {}
        self._gone = "the vLLM engine is not running"
        self._closing = False

    async def start(self, order: vllm_process.Order) -> dict[str, Any]:
        """Start the process; returns facts about what it loaded. ValueError with the reason if vLLM can't serve it."""
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=vllm_process.run, args=(other, order), name="vllm")
        self._process.start()
        other.close()
        self._gone = ""
        self._facts = loop.create_future()
        self._reader = threading.Thread(
            target=self._read, args=(loop, self._connection), name="vllm-reader", daemon=True
        )
        self._reader.start()
        return await self._facts

    async def ask(
        self, number: int, tokens_T: np.ndarray, asked: dict[str, Any], *, priority: int, reads_cache: bool
    ) -> tuple[np.ndarray, int]:
        """Packed rows [R, bytes] uint8 of the job with this number, and how many tokens were computed for them: with
        `reads_cache`, they may be fewer than the job has. A lower `priority` goes first. EngineGone if the process has
        ended, JobFailed if only this job failed."""
        self.check()
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._send("job", number, tokens_T.astype("<i4").tobytes(), asked, priority, reads_cache)
        try:
            return await answer
        finally:
            del self._answers[number]
            if answer.cancelled():
                self._send("abort", number)

    def check(self) -> None:
        """EngineGone if the process has ended or was closed."""
        if self._gone:
            raise EngineGone(self._gone)

    async def close(self) -> None:
        """End the process: gracefully if it serves, by force if it is still loading or does not end in time."""
        if self._process is None or self._closing:
            return
        self._closing = True
        serves = self._serves()
        self._on_end("the vLLM engine is not running")
        if serves:
            self._send("close")
            await asyncio.to_thread(self._process.join, _END_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join, _END_WITHIN_S)
        await asyncio.to_thread(self._reader.join)  # it meets the end of the pipe now, while the loop still runs
        await asyncio.to_thread(self._writer.shutdown)

    def _serves(self) -> bool:
        facts = self._facts
        loaded = facts is not None and facts.done() and not facts.cancelled() and facts.exception() is None
        return loaded and not self._gone

    def _send(self, *message: Any) -> None:
        assert self._connection is not None
        self._writer.submit(self._write, self._connection, message)

    @staticmethod
    def _write(connection: Connection, message: tuple[Any, ...]) -> None:
        try:
            send(connection, *message)
        except OSError:
            return  # the reader sees the end as well, and fails all jobs

    def _read(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> None:
        try:
            while True:
                message = receive(connection)
                if message[0] == "answer":
                    rows = np.frombuffer(connection.recv_bytes(), dtype=np.uint8)
                    message = [*message[:2], (rows.reshape(message[3:]), message[2])]
                loop.call_soon_threadsafe(self._on_message, *message)
        except (EOFError, OSError):
            loop.call_soon_threadsafe(self._on_end, GONE)

    def _on_message(self, name: str, *rest: Any) -> None:
        assert self._facts is not None
        if name == "stage":
            done(*rest)
        elif name == "ready":
            if not self._facts.done():
                self._facts.set_result(rest[0])
        elif name == "refused":
            if not self._facts.done():
                self._facts.set_exception(ValueError(rest[0]))
        elif (answer := self._answers.get(rest[0])) is not None and not answer.done():
            if name == "answer":
                answer.set_result(rest[1])
            else:
                answer.set_exception(JobFailed(rest[1]))

    def _on_end(self, why: str) -> None:
        """The process has ended: fail all jobs that wait."""
        self._gone = self._gone or why
        if self._facts is not None and not self._facts.done():
            self._facts.set_exception(ValueError(f"the engine did not finish loading: {GONE}"))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineGone(self._gone))
