"""Answers on their way out: a stream of msgpack messages as sequences finish, or one JSON document. For `app.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serving.streams import Outlet
from teacher_proto import wire
from teacher_proto.errors import OutOfRangeError, StillhouseError
from teacher_proto.targets import TokenTargets
from teacher_proto.wire_json import json_document
from teacher_service.asked import Asked
from teacher_service.service import TeacherService

# JSON takes some 20 bytes a value, and a list of Python numbers in between.
MAX_JSON_VALUES = 2**20

Outcome = TokenTargets | StillhouseError


def header_of(asked: Asked, service: TeacherService) -> wire.Header:
    spec = asked.request.spec
    return wire.Header(
        request_id=asked.request_id, fingerprint=service.engine.identity.fingerprint,
        num_sequences=len(asked.request.sequences), vocab_size=service.engine.limits.vocab_size, top_k=spec.top_k,
        temperatures=tuple(spec.temperatures),
    )  # fmt: skip


async def outcomes(asked: Asked, service: TeacherService) -> AsyncGenerator[tuple[int, Outcome]]:
    """(index, targets or error) of every sequence, as they finish. Leaving the iterator cancels what is left."""
    finished: asyncio.Queue[asyncio.Task[TokenTargets]] = asyncio.Queue()
    running: dict[asyncio.Task[TokenTargets], int] = {}
    try:
        for index, job in enumerate(asked.jobs()):
            task = asyncio.create_task(service.answers.answer(job, asked.student))
            running[task] = index
            task.add_done_callback(finished.put_nowait)
        while running:
            task = await finished.get()
            index = running.pop(task)
            yield index, _outcome(task, asked.student, service)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _outcome(task: asyncio.Task[TokenTargets], student: str, service: TeacherService) -> Outcome:
    try:
        return task.result()
    except StillhouseError as error:
        service.metrics.failed.labels(student, error.code).inc()
        return error


async def stream(asked: Asked, service: TeacherService, outlet: Outlet) -> None:
    """Write the answer as WIRE.md has it. The status waits for a first success: if every sequence fails, the first
    error is raised and becomes the status."""
    header = header_of(asked, service)
    held: list[tuple[int, StillhouseError]] = []
    async with aclosing(outcomes(asked, service)) as results:
        async for index, outcome in results:
            if isinstance(outcome, TokenTargets):
                message = _encode(index, outcome, header, asked.student, service)
            elif outlet.started:
                message = wire.encode_failure(index, outcome)
            else:
                held.append((index, outcome))
                continue
            if not outlet.started:
                await outlet.start(wire.MSGPACK)
                await outlet.write(wire.encode_header(header))
                for failed, error in held:
                    await outlet.write(wire.encode_failure(failed, error))
            await outlet.write(message)
    if not outlet.started:
        raise held[0][1]
    await outlet.write(wire.encode_end(header.num_sequences), last=True)


def _encode(
    index: int, targets: TokenTargets, header: wire.Header, student: str, service: TeacherService
) -> bytes:  # fmt: skip
    started = time.perf_counter()
    message = wire.encode_targets(index, targets, header.vocab_size)
    service.metrics.encode_seconds.labels(student).inc(time.perf_counter() - started)
    return message


async def document(asked: Asked, service: TeacherService, outlet: Outlet) -> None:
    """Write the answer as one JSON document. If every sequence fails, the first error is raised."""
    async with aclosing(outcomes(asked, service)) as results:
        answers = {index: outcome async for index, outcome in results}
    errors = [answer for answer in answers.values() if isinstance(answer, StillhouseError)]
    if len(errors) == len(answers):
        raise errors[0]
    body = await asyncio.to_thread(json_document, header_of(asked, service), answers)
    await outlet.start(wire.JSON)
    await outlet.write(body, last=True)


def check_json_size(asked: Asked, hidden_width: int) -> None:
    """Refuse what would be a huge document; msgpack has no such limit."""
    values = asked.request.num_tokens * (asked.values_per_token(hidden_width) + 1)
    if values > MAX_JSON_VALUES:
        raise OutOfRangeError(
            f"an answer of {values} values, of at most {MAX_JSON_VALUES} as JSON: ask with "
            f"Accept: {wire.MSGPACK}, or for less", field="sequences", got=values, limit=MAX_JSON_VALUES,
        )  # fmt: skip
