"""Answers on their way out: a stream of msgpack messages as sequences finish, or one JSON document."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic

from serving.answers import Answers
from serving.engine import AnswerT, JobT
from serving.metrics import Metrics
from serving.streams import Outlet
from teacher_proto import wire
from teacher_proto.errors import OutOfRangeError, StillhouseError

# JSON takes some 20 bytes a value, and a list of Python numbers in between.
MAX_JSON_VALUES = 2**20
# What a value takes as JSON (its digits, a Python number, a copy on its way out) of what it takes on our wire.
JSON_WEIGHT = 8


@dataclass(frozen=True)
class Reply(Generic[JobT, AnswerT]):
    """What one request is answered with: a job a sequence, and how an answer is written.

    `header` is the first message, `encode` makes a message of (index, answer), `document` the JSON of all answers.
    """

    jobs: Sequence[JobT]
    student: str
    header: bytes
    encode: Callable[[int, AnswerT], bytes]
    document: Callable[[Mapping[int, AnswerT | StillhouseError]], bytes]


async def outcomes(
    jobs: Sequence[JobT], student: str, answers: Answers[JobT, AnswerT], metrics: Metrics
) -> AsyncGenerator[tuple[int, AnswerT | StillhouseError]]:
    """(index, answer or error) of every job, as they finish. Leaving the iterator cancels what is left."""
    finished: asyncio.Queue[asyncio.Task[AnswerT]] = asyncio.Queue()
    running: dict[asyncio.Task[AnswerT], int] = {}
    try:
        for index, job in enumerate(jobs):
            task = asyncio.create_task(answers.answer(job, student))
            running[task] = index
            task.add_done_callback(finished.put_nowait)
        while running:
            task = await finished.get()
            index = running.pop(task)
            yield index, _outcome(task, student, metrics)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _outcome(task: asyncio.Task[AnswerT], student: str, metrics: Metrics) -> AnswerT | StillhouseError:
    try:
        return task.result()
    except StillhouseError as error:
        metrics.failed.labels(student, error.code).inc()
        return error


async def stream(
    reply: Reply[JobT, AnswerT], answers: Answers[JobT, AnswerT], metrics: Metrics, outlet: Outlet
) -> None:
    """Write the answer as WIRE.md has it. The status waits for a first success: if every sequence fails, the first
    error is raised and becomes the status."""
    held: list[tuple[int, StillhouseError]] = []
    results = outcomes(reply.jobs, reply.student, answers, metrics)
    async with aclosing(results):
        async for index, outcome in results:
            if not isinstance(outcome, StillhouseError):
                started = time.perf_counter()
                message = reply.encode(index, outcome)
                metrics.encode_seconds.labels(reply.student).inc(time.perf_counter() - started)
            elif outlet.started:
                message = wire.encode_failure(index, outcome)
            else:
                held.append((index, outcome))
                continue
            if not outlet.started:
                await outlet.start(wire.MSGPACK)
                await outlet.write(reply.header)
                for failed, error in held:
                    await outlet.write(wire.encode_failure(failed, error))
            await outlet.write(message)
    if not outlet.started:
        raise held[0][1]
    await outlet.write(wire.encode_end(len(reply.jobs)), last=True)


async def document(
    reply: Reply[JobT, AnswerT], answers: Answers[JobT, AnswerT], metrics: Metrics, outlet: Outlet
) -> None:
    """Write the answer as one JSON document. If every sequence fails, the first error is raised."""
    results = outcomes(reply.jobs, reply.student, answers, metrics)
    async with aclosing(results):
        found = {index: outcome async for index, outcome in results}
    errors = [answer for answer in found.values() if isinstance(answer, StillhouseError)]
    if len(errors) == len(found):
        raise errors[0]
    body = await asyncio.to_thread(reply.document, found)
    await outlet.start(wire.JSON)
    await outlet.write(body, last=True)


def check_json_size(values: int) -> None:
    """Refuse what would be a huge document; msgpack has no such limit."""
    if values > MAX_JSON_VALUES:
        raise OutOfRangeError(
            f"an answer of {values} values, of at most {MAX_JSON_VALUES} as JSON: ask with "
            f"Accept: {wire.MSGPACK}, or for less", field="sequences", got=values, limit=MAX_JSON_VALUES,
        )  # fmt: skip
