"""Responses: msgpack messages as sequences finish, with progress in between, or one JSON document. Used by each
service's `app.py` and by the teacher's `compat` routes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fastapi import Request

from serving.engine import Job, QueryT, RecordT
from serving.http.streams import Outlet, RacedResponse
from serving.metrics import Metrics
from serving.scheduling.admission import Admission, Permit
from serving.scheduling.coalescer import Coalescer
from serving.scheduling.fair import Rate
from teacher_proto.errors import MalformedError, OutOfRangeError, StillhouseError
from teacher_proto.wire import records as wire
from teacher_proto.wire.responses import (
    PROGRESS_HEADER,
    PROGRESS_INTERVAL_S,
    SEQUENCE_CRC_HEADER,
    Progress,
    encode_end,
    encode_failure,
    encode_progress,
    sequence_crc,
)

# JSON takes some 20 bytes per value, and a list of Python numbers while it is made.
MAX_JSON_VALUES = 2**20
# Memory of a value as JSON (its digits, a Python number, a copy on its way out), relative to its size in msgpack.
JSON_WEIGHT = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[QueryT]):
    """The work of one validated request: one job per sequence, on a client's account, once `permit` is granted."""

    request_id: str
    client: str
    permit: Permit
    jobs: Sequence[Job[QueryT]]


@dataclass(frozen=True)
class Reply(Generic[QueryT, RecordT]):
    """A request's work, and how its response is written: `header` is the first message, `encode` makes a message of
    (index, result, sequence_crc or None). With `as_json`, `document` makes the JSON of all results instead.
    """

    work: Work[QueryT]
    header: bytes
    encode: Callable[[int, RecordT, int | None], bytes]
    document: Callable[[Mapping[int, RecordT | StillhouseError]], bytes]
    as_json: bool = False


class AnyService(Protocol[QueryT, RecordT]):
    """The parts of a service that a response needs."""

    @property
    def admission(self) -> Admission: ...
    @property
    def coalescer(self) -> Coalescer[QueryT, RecordT]: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def rate(self) -> Rate: ...


async def outcomes(
    work: Work[QueryT], service: AnyService[QueryT, RecordT]
) -> AsyncGenerator[tuple[int, RecordT | StillhouseError]]:
    """(index, result or error) of every job, as they finish. Closing the iterator cancels the remaining jobs."""
    finished: asyncio.Queue[asyncio.Task[RecordT]] = asyncio.Queue()
    running: dict[asyncio.Task[RecordT], int] = {}
    try:
        for index, job in enumerate(work.jobs):
            task = asyncio.create_task(service.coalescer.answer(job, work.client))
            running[task] = index
            task.add_done_callback(finished.put_nowait)
        while running:
            task = await finished.get()
            index = running.pop(task)
            yield index, _outcome(task, work.client, service.metrics)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _outcome(task: asyncio.Task[RecordT], client: str, metrics: Metrics) -> RecordT | StillhouseError:
    try:
        return task.result()
    except StillhouseError as error:
        metrics.failed.labels(client, error.code).inc()
        return error


def response(reply: Reply[QueryT, RecordT], service: AnyService[QueryT, RecordT], request: Request) -> RacedResponse:
    """What a route returns: the response in the requested format, with progress if `request` asks for it."""
    every_s, crcs = _progress_interval(request), SEQUENCE_CRC_HEADER in request.headers

    async def work(outlet: Outlet) -> None:
        if reply.as_json:
            await _document(reply, service, outlet)
        else:
            await _stream(reply, service, outlet, every_s, crcs)

    return RacedResponse(work)


def _progress_interval(request: Request) -> float | None:
    """After how many seconds of silence the client wants a progress message; None if it wants none."""
    given = request.headers.get(PROGRESS_HEADER)
    if given is None:
        return None
    try:
        wished = float(given)
    except ValueError:
        wished = math.nan
    if not wished > 0:
        raise MalformedError(
            f"X-Progress: got {given[:40]!r}, expected seconds, such as 2", field="X-Progress", got=given[:40]
        )
    low, high = PROGRESS_INTERVAL_S
    return min(high, max(low, wished))


async def _stream(
    reply: Reply[QueryT, RecordT], service: AnyService[QueryT, RecordT], outlet: Outlet, every_s: float | None,
    crcs: bool,
) -> None:  # fmt: skip
    """Write the response as WIRE.md defines it, once the request is admitted. The status waits for the first success:
    if every sequence fails, the first error is raised and becomes the status. With `every_s` it waits no longer than
    that: progress is written whenever nothing else was, and a later error becomes a message in the response. `crcs`:
    whether records have a `sequence_crc`."""
    out = _Stream(reply, service, outlet, every_s, crcs)
    try:
        async with AsyncExitStack() as stack:
            told = every_s is not None
            await out.telling(stack.enter_async_context(service.admission.admit(reply.work.permit, told=told)))
            results = outcomes(reply.work, service)
            await stack.enter_async_context(aclosing(results))
            while (result := await out.telling(anext(results, None))) is not None:
                await out.write(*result)
        await out.end()
    except StillhouseError as error:
        if not outlet.started:
            raise
        await outlet.write(encode_failure(None, error), last=True)


class _Stream(Generic[QueryT, RecordT]):
    """One response being written: what has been sent of it, and progress while there is nothing else to send."""

    def __init__(
        self, reply: Reply[QueryT, RecordT], service: AnyService[QueryT, RecordT], outlet: Outlet,
        every_s: float | None, crcs: bool,
    ):  # fmt: skip
        self._reply = reply
        self._service = service
        self._outlet = outlet
        self._every_s = every_s
        self._crcs = crcs
        self._held: list[tuple[int, StillhouseError]] = []
        self._keys = {i: job.query.key for i, job in enumerate(reply.work.jobs)} if every_s is not None else {}
        self._tokens = sum(job.query.num_tokens for job in reply.work.jobs)
        self._tokens_done = 0

    async def telling(self, result: Awaitable[T]) -> T:
        """Await `result`; until it is available, write progress whenever nothing was sent for `every_s`."""
        if self._every_s is None:
            return await result
        task = asyncio.ensure_future(result)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=max(0.0, self._every_s - self._outlet.silent_s))
                if not task.done() and self._outlet.silent_s >= self._every_s:
                    await self._tell()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _tell(self) -> None:
        coalescer, admission = self._service.coalescer, self._service.admission
        ahead = coalescer.tokens_ahead(self._keys.values()) + admission.tokens_before(self._reply.work.permit)
        progress = Progress(self._tokens_done, self._tokens, ahead, self._service.rate.tokens_per_second)
        await self._start()
        await self._outlet.write(encode_progress(progress))

    async def _start(self) -> None:
        if self._outlet.started:
            return
        await self._outlet.start(wire.MSGPACK)
        await self._outlet.write(self._reply.header)
        for failed, error in self._held:
            await self._outlet.write(encode_failure(failed, error))

    async def write(self, index: int, outcome: RecordT | StillhouseError) -> None:
        """Write a result or an error; errors are held back until something else has been written."""
        job = self._reply.work.jobs[index]
        self._tokens_done += job.query.num_tokens
        self._keys.pop(index, None)
        if not isinstance(outcome, StillhouseError):
            started = time.perf_counter()
            crc = sequence_crc(index, job.query.tokens_T) if self._crcs else None
            message = self._reply.encode(index, outcome, crc)
            self._service.metrics.encode_seconds.labels(self._reply.work.client).inc(time.perf_counter() - started)
        elif self._outlet.started:
            message = encode_failure(index, outcome)
        else:
            self._held.append((index, outcome))
            return
        await self._start()
        await self._outlet.write(message)

    async def end(self) -> None:
        """Write the end message; if every sequence failed and nothing was written, raise the first error."""
        if not self._outlet.started:
            raise self._held[0][1]
        await self._outlet.write(encode_end(len(self._reply.work.jobs)), last=True)


async def _document(reply: Reply[QueryT, RecordT], service: AnyService[QueryT, RecordT], outlet: Outlet) -> None:
    """Write the response as one JSON document, without progress. If every sequence fails, the first error is raised."""
    async with service.admission.admit(reply.work.permit):
        results = outcomes(reply.work, service)
        async with aclosing(results):
            found = {index: outcome async for index, outcome in results}
        errors = [answer for answer in found.values() if isinstance(answer, StillhouseError)]
        if len(errors) == len(found):
            raise errors[0]
        body = await asyncio.to_thread(reply.document, found)
        await outlet.start(wire.JSON)
        await outlet.write(body, last=True)


def check_json_size(values: int) -> None:
    """OutOfRangeError if the JSON document would be huge; msgpack has no such limit."""
    if values > MAX_JSON_VALUES:
        raise OutOfRangeError(
            f"the response has {values} values, expected at most {MAX_JSON_VALUES} as JSON: send "
            f"Accept: {wire.MSGPACK}, or request less", field="sequences", got=values, limit=MAX_JSON_VALUES,
        )  # fmt: skip
